"""What a sample takes is counted in runs of every recipe, at their end, by all ranks together."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_trials import log_of, run, write_trial
from test_resume_of_recipes import FIELDS, root, write  # noqa: F401

from ablate.records.folder import TrialRecord


def count_on_cpus() -> None:
    """In a rank: count as on GPUs."""
    from ablate.training import fit

    fit.COUNTED_ON = ("cpu",)


def counted(trial: TrialRecord, *, workers: int) -> float:
    assert run(trial.folder, workers=workers, prepare=count_on_cpus) == [0] * workers, log_of(trial)
    result = trial.result(1)
    assert result is not None and result["status"] == "completed"
    return float(result["flops_per_sample"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FIELDS)
def test_a_sample_takes_as_much_on_two_ranks(
    name: str,
    root: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Counting ends no run, of one rank or of two; their losses over all samples differ a little
    in what a sample takes, models do not."""
    one, two = (
        counted(write(tmp_path / str(workers), name, root, workers=workers), workers=workers)
        for workers in (1, 2)
    )
    assert two == pytest.approx(one, rel=0.1) and one > 1e5


@pytest.mark.exhaustive
def test_accumulation_takes_no_more_of_a_sample(tmp_path: Path, data: Path) -> None:
    """The features that it computes twice are computed again to save memory."""
    whole, halves = (
        counted(
            write_trial(tmp_path / str(freq), data, accum_freq=freq, batch_size=16 // freq),
            workers=1,
        )
        for freq in (1, 2)
    )
    assert halves == pytest.approx(whole, rel=0.05)
