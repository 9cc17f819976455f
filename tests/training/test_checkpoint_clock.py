"""Checkpoints within an epoch: by the clock, cheap, and as good as those at its end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from interruptions import left_behind, measured
from small_trials import run, start, wait_for, write_trial

from ablate.training import checkpoint
from ablate.training.checkpoint_clock import CheckpointClock

STEPS = 90
FIELDS = {"epochs": 1, "train_num_samples": 16 * STEPS, "batch_size": 8}


def test_one_is_due_when_time_has_passed_and_they_are_cheap() -> None:
    """Not before `every_s` since the last one of any kind, nor while they would take more than one
    per cent of the time; none where they are switched off."""
    clock = CheckpointClock(600.0, now=0.0)
    assert not clock.is_due(599.0) and clock.is_due(600.0)
    clock.note(began=600.0, now=602.0)
    assert not clock.is_due(1201.0) and clock.is_due(1202.0)
    clock.note(began=1202.0, now=1222.0)  # 20 s: not more often than every 2,000 s
    assert not clock.is_due(3221.0) and clock.is_due(3222.0)
    assert not CheckpointClock(0.0, now=0.0).is_due(1e9)


@pytest.mark.drill
def test_a_run_that_dies_within_an_epoch_goes_on_from_there(data: Path, tmp_path: Path) -> None:
    """Two ranks of one long epoch are killed once a checkpoint of its midst is there: they go on
    with the next step, and every number and the weights are those of a run without any."""
    whole = write_trial(tmp_path / "whole", data, gang=2, **FIELDS, checkpoint_minutes=0)
    assert run(whole.folder, workers=2) == [0, 0]
    assert checkpoint.steps(whole.folder / "checkpoints") == [STEPS]
    cut = write_trial(tmp_path / "cut", data, gang=2, **FIELDS, checkpoint_minutes=1e-6)
    ranks = start(cut.folder, workers=2)
    places = cut.folder / "checkpoints"
    wait_for(lambda: [step for step in checkpoint.steps(places) if step > 5], "a checkpoint")
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    kept = max(checkpoint.steps(places))
    assert kept < STEPS, "it died too late"
    assert run(cut.folder, workers=2) == [0, 0]
    assert (cut.first_row(2) or {})["step"] == kept + 1
    assert measured(cut.trace()) == measured(whole.trace())
    assert measured(cut.evaluations()) == measured(whole.evaluations())
    for part in ("model.safetensors", "optimizer.safetensors"):
        assert left_behind(cut)[part] == left_behind(whole)[part]
