"""A killed trial comes back as if nothing had happened, whenever and however it ran."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from interruptions import LAST_WORDS, MOMENTS, SMALL, Interruption, assert_same
from pairs import all_pairs, cover
from small_trials import log_of, run, start, write_trial

from ablate.records.files import read_rows
from ablate.records.folder import TrialRecord
from ablate.training import checkpoint

STEPS, CHECKPOINTS = 8, 2

PRECISIONS = ("fp32", "amp_bf16", "amp")
ACCUM_FREQS = (1, 2)
LOADERS = (0, 2)
RANKS = (1, 2)


class Case(NamedTuple):
    """A run and the moment of its death."""

    precision: str
    accum_freq: int
    workers: int
    ranks: int
    moment: str

    @property
    def fields(self) -> dict[str, Any]:
        batch_size = 16 // (self.accum_freq * self.ranks)
        own = {"precision": self.precision, "accum_freq": self.accum_freq}
        return {**SMALL, **own, "batch_size": batch_size, "workers": self.workers}

    @property
    def interruption(self) -> Interruption:
        return Interruption(
            self.moment, self.ranks, self.accum_freq, STEPS, CHECKPOINTS, seed=str(self)
        )

    def __str__(self) -> str:
        return (
            f"{self.precision}, accum {self.accum_freq}, {self.workers} loaders, "
            f"{self.ranks} ranks, {self.moment}"
        )


FULL = [
    Case(*factors)
    for factors in itertools.product(PRECISIONS, ACCUM_FREQS, LOADERS, RANKS, MOMENTS)
]
"""Every combination: 120 cases, on demand (-m exhaustive)."""
FACTORS = {
    "precision": PRECISIONS,
    "accum_freq": tuple(map(str, ACCUM_FREQS)),
    "workers": tuple(map(str, LOADERS)),
    "ranks": tuple(map(str, RANKS)),
    "moment": MOMENTS,
}
COVERING = [
    Case(
        row["precision"],
        int(row["accum_freq"]),
        int(row["workers"]),
        int(row["ranks"]),
        row["moment"],
    )
    for row in cover(FACTORS, all_pairs(FACTORS, lambda row: True))
]
"""Every pair of their levels."""
IN_THE_SUITE = [
    next(case for case in COVERING[number % 2 :: 2] if case.moment == moment)
    for number, moment in enumerate(MOMENTS)
]
"""One for each moment, and every level once; the other pairs on demand."""


def test_the_cases_cover_every_pair() -> None:
    """Of two factors, and of a factor and a moment."""
    for one, other in itertools.combinations(range(5), 2):
        assert {(case[one], case[other]) for case in COVERING} == {
            (case[one], case[other]) for case in FULL
        }
    for one in range(5):
        assert {case[one] for case in IN_THE_SUITE} == {case[one] for case in FULL}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[Case], TrialRecord]:
    """The run of a case that nothing interrupts, without loader processes; made once."""
    made: dict[tuple[Any, ...], TrialRecord] = {}

    def find(case: Case) -> TrialRecord:
        key = (case.precision, case.accum_freq, case.ranks)
        if key not in made:
            folder = tmp_path_factory.mktemp("whole") / "trial"
            trial = write_trial(folder, data, gang=case.ranks, **{**case.fields, "workers": 0})
            assert run(trial.folder, workers=case.ranks) == [0] * case.ranks, log_of(trial)
            made[key] = trial
        return made[key]

    return find


def die_and_come_back(folder: Path, data: Path, case: Case, whole: TrialRecord) -> None:
    """kill -9 a rank at the case's moment, the others after it; run again; all is the same."""
    trial = write_trial(folder, data, gang=case.ranks, **case.fields)
    codes = start(folder, workers=case.ranks, prepare=case.interruption).wait_for_a_death()
    assert -signal.SIGKILL in codes and 0 not in codes and LAST_WORDS in log_of(trial)
    assert trial.result(1) is None
    assert run(folder, workers=case.ranks) == [0] * case.ranks, log_of(trial)
    assert_same(trial, whole)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in IN_THE_SUITE else pytest.mark.exhaustive)
        for case in COVERING
    ],
    ids=str,
)
def test_a_killed_run_ends_as_the_run_that_was_not_killed(
    tmp_path: Path, data: Path, whole: Callable[[Case], TrialRecord], case: Case
) -> None:
    """All losses bit-equal, all files equal, whatever the precision, accumulation, loaders, ranks;
    loader processes make no difference either: the whole run has none."""
    die_and_come_back(tmp_path / "trial", data, case, whole(case))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", FULL, ids=str)
def test_every_combination_ends_as_the_run_that_was_not_killed(
    tmp_path: Path, data: Path, whole: Callable[[Case], TrialRecord], case: Case
) -> None:
    """The same for each of the 120 combinations."""
    die_and_come_back(tmp_path / "trial", data, case, whole(case))


def test_damage_costs_time_and_changes_nothing(
    tmp_path: Path, whole: Callable[[Case], TrialRecord]
) -> None:
    """With its newest checkpoint damaged a trial goes on from the one before, to the same end."""
    straight = whole(Case("fp32", 1, 0, 1, ""))
    shutil.copytree(straight.folder, tmp_path / "damaged")
    trial = TrialRecord(tmp_path / "damaged")
    newest = checkpoint.path_of(trial.folder / "checkpoints", 8)
    os.truncate(newest / "optimizer.safetensors", 1000)
    assert run(trial.folder) == [0]
    assert read_rows(trial.attempt_folder(2) / "trace.jsonl")[0]["step"] == 5
    assert (trial.folder / "checkpoints" / "quarantine").exists()
    assert_same(trial, straight)
