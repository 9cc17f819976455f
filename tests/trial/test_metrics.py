"""Every measurement is declared once."""

from __future__ import annotations

from ablate.markers.event import ACCURACY
from ablate.markers.rules import RULES
from ablate.recipes import openclip
from ablate.trial import metrics
from ablate.trial.recipe import describe, judged


def test_every_input_of_a_marker_is_declared() -> None:
    """What a marker reads stands in the table, grouped names by their first part; the accuracy is
    the one that the recipe has judged."""
    declared = openclip.metrics(openclip.Config())
    assert judged(declared) == "imagenet_top1"
    read = {name for rule in RULES for name in rule.reads} - {ACCURACY}
    missing = {name for name in read if metrics.describe(name) is None}
    assert {name for name in missing if describe(declared, name) is None} == set()


def test_objectives_say_which_way_is_better() -> None:
    """Whatever a study may be judged by has a direction."""
    assert all(metric.direction for metric in openclip.metrics(openclip.Config()))


def test_an_unknown_name_is_not_described() -> None:
    """A misspelt measurement is nobody's."""
    assert metrics.describe("imagenet_top2") is None
    assert metrics.describe("rms/visual.conv1.weight") is metrics.METRICS["rms"]
