"""Every measurement is declared once."""

from __future__ import annotations

from ablate import metrics
from ablate.markers.rules import RULES


def test_every_input_of_a_marker_is_declared() -> None:
    """What a marker reads stands in the table, grouped names by their first part."""
    read = {name for rule in RULES for name in rule.reads}
    assert {name for name in read if metrics.describe(name) is None} == set()


def test_objectives_say_which_way_is_better() -> None:
    """Whatever a study may be judged by has a direction."""
    assert "imagenet_top1" in metrics.objectives()
    assert all(metrics.METRICS[name].direction for name in metrics.objectives())


def test_an_unknown_name_is_not_described() -> None:
    """A misspelt measurement is nobody's."""
    assert metrics.describe("imagenet_top2") is None
    assert metrics.describe("rms/visual.conv1.weight") is metrics.METRICS["rms"]
