"""The only user of mlflow: mirrors a study folder into MLflow, and never reads it back.

One experiment per study; in it a run for the study, below it one per cell, below that one per
trial. The folder is the truth, so a mirror can be deleted and built again, and an outage of MLflow
costs nothing but time: a thread of its own does all the talking, tries again after a failure, and
catches up. What stands in MLflow is the same whether it was mirrored live, after an outage, or
from the folder at the end. Which rows are mirrored is said in ``rows``.
"""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported
# Standard output is for --json.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from ablate.tracking.server import Server, serve  # noqa: E402
from ablate.tracking.store import default_uri  # noqa: E402
from ablate.tracking.tracker import Tracker  # noqa: E402

__all__ = ["Server", "Tracker", "default_uri", "serve"]
