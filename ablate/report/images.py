"""What each contrast of two cells looks like image by image, where the records have a bit each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ablate.analysis.images import OnImages, split
from ablate.records.answers import BoolArray, unpack, unpack_labels
from ablate.report.questions import Question
from ablate.study.table import CellRow, StudyTable
from ablate.trial.identity import Outcome


@dataclass(frozen=True, slots=True)
class ImageView:
    """One contrast on these images and on others."""

    factor: str
    level: str
    reference: str
    delta: float
    found: OnImages


def image_views(table: StudyTable, asked: Sequence[Question]) -> tuple[ImageView, ...]:
    """The contrasts of one cell with one other, whose runs have all told which images they got
    right; none of them for other objectives than a share of images."""
    if table.study.objective.at != "last":
        return ()  # bits are kept of the last evaluation
    answers = _Answers(table)
    found = []
    for question in asked:
        base = question.analysis.baseline
        reference = table.cell(base)
        for c in question.analysis.contrasts:
            cell = table.cell({**base, c.factor: c.level})
            if c.estimand != "simple" or c.delta is None or c.standard_error is None:
                continue
            if cell is None or reference is None:
                continue
            pair = answers.paired(cell, reference)
            if pair is None:
                continue
            on = split(*pair, answers.labels, standard_error=c.standard_error, df=c.df)
            if on is not None:
                found.append(ImageView(c.factor, c.level, c.reference, c.delta, on))
    return tuple(found)


class _Answers:
    """Bits of the runs of a study, read once each."""

    def __init__(self, table: StudyTable) -> None:
        self._table = table
        self._metric = table.study.objective.metric
        self._known: dict[str, BoolArray | None] = {}
        self.labels: Any = None

    def paired(self, cell: CellRow, other: CellRow) -> tuple[BoolArray, BoolArray] | None:
        """[seed, image] of both cells over the seeds that both completed."""
        mine, its = self._of(cell), self._of(other)
        if mine is None or its is None:
            return None
        seeds = [seed for seed in mine if seed in its]
        sizes = {len(bits) for seed in seeds for bits in (mine[seed], its[seed])}
        if len(seeds) < 2 or len(sizes) != 1:
            return None
        return np.array([mine[s] for s in seeds]), np.array([its[s] for s in seeds])

    def _of(self, cell: CellRow) -> dict[int, BoolArray] | None:
        found = {}
        for row in cell.trials:
            if row.state == Outcome.COMPLETED:
                bits = self._read(row.id, row.step)
                if bits is None:
                    return None
                found[row.seed] = bits
        return found

    def _read(self, trial: str, step: int) -> BoolArray | None:
        """Of the evaluation at the last step."""
        if trial not in self._known:
            self._known[trial] = None
            rows = self._table.record.record(trial).answers()
            told: list[Mapping[str, Any]] = [
                row["of"][self._metric] for row in rows if self._metric in row["of"]
            ]
            if self.labels is None:
                text = next((one["labels"] for one in told if "labels" in one), None)
                self.labels = None if text is None else unpack_labels(text)
            if told and rows[-1]["step"] == step:
                self._known[trial] = unpack(told[-1]["right"], told[-1]["images"])
        return self._known[trial]
