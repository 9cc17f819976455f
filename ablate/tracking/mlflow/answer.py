"""What a study says so far, as its page in MLflow shows it: a sentence, and a verdict per cell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ablate.analysis.analysis import Contrast
from ablate.records.folder import StudyRecord
from ablate.report.best import Recommendation, recommend
from ablate.report.questions import ContrastRow, Question, contrast_rows, questions, verdict_words
from ablate.report.scale import NONE, Scale, scale_of
from ablate.study import Search, Study
from ablate.study.sweep import answer_of
from ablate.study.table import StudyTable, read_table
from ablate.trial.identity import Levels
from ablate.words import counted

_MOST_TOLD = 2
"""Settings of a kind that the sentence names: it must fit into one line of the page."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A cell against the baseline."""

    verdict: str
    difference: str
    """With its 95 % interval, in points where the objective is a share."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the records of a study say."""

    sentence: str
    """Of one line."""
    use: Recommendation
    effects: Mapping[Levels, Effect]
    """By a cell's levels; cells that are compared with nothing have none."""


def read_answer(study: Study, record: StudyRecord) -> Answer:
    """Judge what has ended.

    Raises:
        AnalysisError, RecordError, OSError: a record is not whole.
    """
    table = read_table(study, record, curves=False)
    asked = questions(table)
    scale = scale_of(study, (question.analysis for question in asked))
    use = recommend(table)
    rows = [(question, row) for question in asked for row in contrast_rows(table, question, scale)]
    effects = dict(_effects(table, asked, scale))
    if use.cell is not None and use.over_baseline is not None and use.cell.levels not in effects:
        effects[use.cell.levels] = _chosen(use.over_baseline, scale)
    return Answer(_sentence(table, rows, scale, use), use, effects)


def _chosen(found: Contrast, scale: Scale) -> Effect:
    """Of a combination that is handed out; its interval allows for its having been chosen."""
    return Effect(verdict_words(found), scale.difference(found.delta, found.ci_adjusted))


def _sentence(
    table: StudyTable,
    rows: list[tuple[Question, ContrastRow]],
    scale: Scale,
    use: Recommendation,
) -> str:
    ended, number = sum(row.ended for row in table.rows), len(table.rows)
    head = "Answer" if ended == number else f"{ended} of {counted(number, 'trial')}, so far"
    if isinstance(table.study.design, Search):
        return f"{head}: {use.sentence if ended else 'no answer yet.'}"
    against = [row for question, row in rows if question.reference == "the baseline"]
    told = [
        _listed(word, [(row, row.delta) for row in against if row.role == word and _calm(row)])
        for word in ("better", "worse")
    ]
    unstable = [(row, row.diverged.replace("/", " of ")) for row in against if not _calm(row)]
    told.append(_listed("diverges", unstable))
    nothing = "no difference is decided" if ended == number and rows else "no answer yet"
    if ended == number and use.cell is not None:
        told.append(f"use {'the ' if use.cell is table.baseline else ''}{use.cell.name}")
    return f"{head}: {'; '.join(filter(None, told)) or nothing}."


def _calm(row: ContrastRow) -> bool:
    return row.diverged == NONE or row.diverged.startswith("0/")


def _listed(word: str, rows: Sequence[tuple[ContrastRow, str]]) -> str:
    """``better: beta2=0.98 (+1.5), lr=0.002 (+0.6)``; the clearest first, and no more than fit."""
    if not rows:
        return ""
    names = [f"{row.factor}={row.level} ({how})" for row, how in sorted(rows, key=_clearest)]
    more = len(names) - _MOST_TOLD
    return f"{word}: {', '.join(names[:_MOST_TOLD])}{f' and {more} more' if more > 0 else ''}"


def _clearest(told: tuple[ContrastRow, str]) -> float:
    found = re.search(r"[\d.]+", told[1])
    return -float(found[0]) if found else 0.0


def _effects(
    table: StudyTable, asked: tuple[Question, ...], scale: Scale
) -> Iterator[tuple[Levels, Effect]]:
    """Of cells in which one factor is changed, where the comparison is of that cell's own runs;
    of a search's best cells what its model believes of them."""
    usual = table.study.compared_baseline()
    if isinstance(table.study.design, Search):
        yield from _beliefs(table, scale)
    stands = _stand_ins(table)
    for question in asked:
        if question.reference != "the baseline":
            continue
        rows = contrast_rows(table, question, scale)
        for contrast, row in zip(question.analysis.contrasts, rows, strict=True):
            if contrast.estimand != "simple":
                continue
            compared = tuple({**usual, row.factor: row.level}.items())
            difference = scale.difference(contrast.delta, contrast.ci)
            if not _calm(row):  # the difference of those that survived would mislead
                difference = f"diverges in {row.diverged.replace('/', ' of ')}"
            yield stands.get(compared, compared), Effect(row.verdict, difference)
    base = tuple(usual.items())
    yield stands.get(base, base), Effect("the baseline", "")


def _beliefs(table: StudyTable, scale: Scale) -> Iterator[tuple[Levels, Effect]]:
    found = answer_of(table.study, table.results)
    best = {use.cell: use.gain for use in found.ranking} if found is not None else {}
    for cell in table.cells:
        gain = best.get(tuple(level for _, level in cell.levels))
        if gain is None:
            yield cell.levels, Effect("not among the best", "")
            continue
        word = "better" if gain.low > 0 else "worse" if gain.high < 0 else "open"
        yield cell.levels, Effect(word, scale.difference(gain.mean, (gain.low, gain.high)))


def _stand_ins(table: StudyTable) -> dict[Levels, Levels]:
    """Compared levels -> levels of the cell that stands for them, where settings are tuned."""
    found = {}
    for row in table.tuning:
        if row.best is not None:
            levels = row.candidates[row.best].levels
            found[table.study.compared_levels(levels)] = levels
    return found
