"""Suspects that only a model has which tells pairs of images and captions apart."""

from __future__ import annotations

from ablate.markers import asks
from ablate.markers.clue import Cause, Clue


def causes() -> tuple[Cause, ...]:
    """For :func:`ablate.markers.diagnosis.diagnose`, beside the causes that any model has."""
    return _CAUSES


_CAUSES: tuple[Cause, ...] = (
    Cause(
        "images and captions do not belong together",
        {"train_data": "check the pairing of a few samples", "dataset_type": "that of the shards"},
        "uniform logits have a loss of ln(batch); random pairs teach nothing below it",
        clues=(
            Clue(0.5, asks.both(asks.said("divergence", "chance"), asks.never_learnt)),
            Clue(0.4, asks.said("divergence", "chance")),
            Clue(0.3, asks.pulls),
        ),
        against=(
            Clue(0.6, asks.vanished),
            Clue(0.6, asks.said("divergence", "overshoot")),
            Clue(0.6, asks.said("logit_scale", "jump")),
            Clue(0.6, asks.said("update_ratio", "high")),
            Clue(0.8, asks.said("update_ratio", "low")),
            Clue(0.8, asks.said("dead_gradient")),
            Clue(0.8, asks.forgot),
            Clue(0.8, asks.ALL_ALIKE),
        ),
    ),
    Cause(
        "images or captions that are all alike",
        {"train_data": "look at a few samples", "aug_cfg": "without what may blank an image"},
        "a tower that sees one input has one output; no network at initialisation does that to "
        "inputs that differ",
        clues=(Clue(0.9, asks.ALL_ALIKE),),
    ),
    Cause(
        "the temperature is out of its useful range",
        {"batch_size": "larger", "lr": "lower"},
        "open_clip clamps the temperature to 100 after every step, which hides its gradient",
        clues=(
            Clue(0.8, asks.said("logit_scale", "unbounded")),
            Clue(0.6, asks.said("logit_scale", "fallen")),
            Clue(0.7, asks.both(asks.nothing_else, asks.said("logit_scale", "saturated"))),
        ),
        against=(Clue(0.3, asks.DIVERGED), Clue(0.6, asks.thrown)),
    ),
)
