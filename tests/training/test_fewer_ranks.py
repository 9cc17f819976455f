"""A gang that lost half of its ranks goes on with the others, as the same experiment."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from small_trials import run, start, wait_for, write_trial

from ablate.records.files import read_json
from ablate.records.folder import TrialRecord
from ablate.training import checkpoint


@pytest.mark.exhaustive
def test_one_rank_stands_for_two(tmp_path: Path, data: Path) -> None:
    """After a kill one rank takes up what two began: same steps, same samples a step, a certificate
    that says so, and losses that follow those of the whole gang; without being asked to, it won't.

    The number of samples is no multiple of the global batch, so that both must round alike.
    """
    settings = {"epochs": 3, "batch_size": 8, "train_num_samples": 90}
    whole = write_trial(tmp_path / "whole", data, gang=2, **settings)
    assert run(whole.folder, workers=2) == [0, 0]
    trial = write_trial(tmp_path / "trial", data, gang=2, **settings)
    ranks = start(trial.folder, workers=2)
    try:
        wait_for(
            lambda: checkpoint.steps(trial.folder / "checkpoints") or trial.result(1),
            "a checkpoint",
        )
    finally:
        ranks.signal(signal.SIGKILL)
        ranks.wait()
    assert run(trial.folder, workers=1) == [1], "one rank must not pass for two by chance"
    assert run(trial.folder, workers=1, ABLATE_SHARE="2") == [0]
    last = trial.attempts()[-1]
    certificate = read_json(trial.attempt_folder(last) / "resumed.json")
    assert certificate["changed"]["ranks"] == [2, 1]
    ours, theirs = rows(trial), rows(whole)
    assert list(ours) == list(theirs) == list(range(1, len(ours) + 1))
    assert [ours[k]["samples"] for k in ours] == [theirs[k]["samples"] for k in theirs]
    assert [ours[k]["lr"] for k in ours] == [theirs[k]["lr"] for k in theirs]
    first = certificate["step"]
    assert first > 0 and all(ours[k]["loss"] == theirs[k]["loss"] for k in range(1, first + 1))
    # One step on, before the difference in BatchNorm's statistics and rounding could grow.
    assert abs(ours[first + 1]["loss"] - theirs[first + 1]["loss"]) < 1e-3
    result = trial.result(last)
    assert result is not None and result["status"] == "completed"


def rows(trial: TrialRecord) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in trial.trace()}
