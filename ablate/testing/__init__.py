"""Contract tests that a recipe, a marker, an evaluation, a cluster and a sink inherit, ours and
yours. Each is a class to derive from in a test file; pytest runs it.
"""

from ablate.testing.cluster import ClusterContract
from ablate.testing.evaluation import EvaluationContract
from ablate.testing.marker import MarkerContract, Trace
from ablate.testing.recipe import RecipeContract
from ablate.testing.sink import SinkContract

__all__ = [
    "ClusterContract",
    "EvaluationContract",
    "MarkerContract",
    "RecipeContract",
    "SinkContract",
    "Trace",
]
