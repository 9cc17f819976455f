"""The trainers whose runs our recipes know."""

from __future__ import annotations

from functools import cache

from ablate.markers.foreign.run import Trainer
from ablate.trial.recipe import ability, having


@cache
def known_trainers() -> tuple[Trainer, ...]:
    """One of each recipe that has ``peer_runs``."""
    return tuple(ability(recipe, "peer_runs")() for recipe in having("peer_runs"))
