"""Which setting of a study to use, why, and what is known against it: the policy in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING

from ablate.analysis import recommend as policy
from ablate.analysis import verdict
from ablate.analysis.analysis import Contrast, analyze_results
from ablate.analysis.posterior import Belief
from ablate.analysis.recommend import Choice, Evidence
from ablate.analysis.results import Result, tabulate
from ablate.analysis.settle import at_chance
from ablate.errors import AnalysisError
from ablate.report.learning import nothing_learnt
from ablate.report.questions import questions
from ablate.report.scale import objective_of, scale_of
from ablate.report.sweep_words import left_sentence, use_sentence
from ablate.study import LeaveOneOut, Observed, Search
from ablate.study.controls import withheld
from ablate.study.sweep import answer_of
from ablate.study.table import CellRow, StudyTable, TrialRow
from ablate.trial.identity import Levels, Outcome
from ablate.words import are, counted

if TYPE_CHECKING:
    from ablate.analysis.results import Cell
    from ablate.report.scale import Scale

ASKED = "asked"
"""Kind of a recommendation that is none: the cell was named."""
MOST_NAMES = 4
_NORMAL_95 = 2 * 1.959964
"""Width of a 95 % interval in standard deviations."""
_LAUNCH = "Launch the study again to run what is missing."
_OBSERVED = "Runs that were made elsewhere hand out no setting: they are no experiment."
_ASK = "Ask what stands out as a study, with seeds of its own: `ablate init --recipe command`."
_ALL_THE_SAME = "To hand out one of them all the same, name it: `ablate export --cell`."


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to use after a study: combine and confirm (:mod:`ablate.analysis.recommend`)."""

    kind: str
    """combination | cell | baseline | nothing, as the policy calls them; or asked."""
    cell: CellRow | None
    """None when nothing is handed out."""
    trial: TrialRow | None
    """The cell's run of the median seed: a typical one, not the luckiest."""
    why: str
    """What to use and for which reason, in a few sentences."""
    evidence: Evidence | None
    over_baseline: Contrast | None
    """The cell against the baseline, judged together with all compared cells; None for the
    baseline itself and where it cannot be compared."""
    compared: int
    """Cells that were compared."""
    rivals: tuple[str, ...]
    """Of these, cells that are not shown to differ from it."""
    to_know_more: str
    """What it takes to know more, in a sentence; empty when nothing can be run for it."""
    more_trials: int
    """How many trials that is."""
    combination: Levels | None
    """Changes that look better alone and have not been run together on all seeds."""
    known_against: tuple[str, ...]
    """What speaks against using the cell, in clauses."""
    warnings: tuple[str, ...]
    """What else to know: settings with a better mean that are not handed out, cells left out."""

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.warnings)
        return f"<p>{escape(self.sentence)}</p>" + (f"<ul>{notes}</ul>" if notes else "")

    @property
    def chosen(self) -> CellRow:
        """The cell that is handed out; AnalysisError when there is none, with the reason."""
        if self.cell is None:
            raise AnalysisError(self.sentence)
        return self.cell

    @property
    def run(self) -> TrialRow:
        """Its run that is handed out; AnalysisError when there is none."""
        return self.trial or self.chosen.trials[0]

    @property
    def score(self) -> float:
        """Mean over `seeds`; NaN when nothing is handed out."""
        return self.evidence.mean if self.evidence else float("nan")

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.evidence.seeds if self.evidence else ()

    @property
    def sentence(self) -> str:
        return " ".join(part for part in (self.why, self.to_know_more) if part)


def recommend(table: StudyTable) -> Recommendation:
    """Combine and confirm, of the cells whose runs have all completed.

    Never a control, a setting of which a run diverged or failed, nor the best mean for its own
    sake.
    """
    study = table.study
    against = {cell.levels: known_against(table, cell) for cell in table.cells}
    seeds = study.seeds if study.sequential is None else study.seeds[: study.sequential.min]
    results = [row.result(cell.levels) for cell in table.cells for row in cell.trials if row.ended]
    if not results:
        why = "No trial has ended yet, so there is nothing to hand out."
        if table.foreign:
            others = counted(len(table.foreign), "trial")
            why += f" {others} in the folder {are(len(table.foreign))} of other settings: since "
            why += "they ran the study file has changed, or the recipe."
        return _nothing(table, why, _LAUNCH)
    unlearnt = nothing_learnt(table) or at_chance(tabulate(results), objective_of(table))
    if unlearnt:
        return _nothing(table, f"Nothing was learnt: {unlearnt}.", _ALL_THE_SAME)
    named = {_names(cell.levels): cell for cell in table.cells}
    if isinstance(study.design, Observed):
        return _nothing(table, _OBSERVED, _ASK)
    if isinstance(study.design, Search):
        return _of_a_search(table, named, against)
    layout = tabulate(results)
    choice = policy.choose(
        layout,
        _names(tuple(study.compared_baseline().items())),
        objective_of(table),
        seeds=seeds,
        barred={_names(levels) for levels, why in against.items() if why},
        added={_names(levels) for levels in table.added},
    )
    if choice.cell is None or choice.evidence is None:
        return _nothing(table, *_why_nothing(table, against))
    cell, compared = named[choice.cell], [named[one] for one in choice.compared]
    over = _over_baseline(table, cell) if table.baseline in compared else None
    apart = policy.told_apart(layout, choice.compared, choice.cell)
    rivals = [named[c].name for c in choice.compared if c not in apart and c != choice.cell]
    more, trials, untried = _to_know_more(table, choice)
    return Recommendation(
        kind=choice.kind,
        cell=cell,
        trial=_median(cell, study.objective.sign),
        why=_why(table, choice, named, over, rivals),
        evidence=choice.evidence,
        over_baseline=over,
        compared=len(choice.compared),
        rivals=tuple(rivals),
        to_know_more=more,
        more_trials=trials,
        combination=untried,
        known_against=(),
        warnings=(*_passed_over(table, choice.evidence, against), *_left_out(table)),
    )


def _of_a_search(
    table: StudyTable, named: Mapping[Cell, CellRow], against: Mapping[Levels, list[str]]
) -> Recommendation:
    """What the model of the response says to use, of the cells that have run."""
    study = table.study
    found = answer_of(study, table.results)
    if found is None or found.use is None:
        return _nothing(table, *_why_nothing(table, against))
    use, scale = found.use, scale_of(study, ())
    cell = named[use.cell]
    values = {row.seed: row.value for row in cell.trials if row.value is not None}
    usual = {row.seed: row.value for row in table.baseline.trials if row.value is not None}
    shared = [study.objective.sign * (values[s] - usual[s]) for s in values if s in usual]
    believed = None
    if use.gain is not None and use.gain.low > -math.inf:
        believed = Belief(use.gain.mean, (use.gain.high - use.gain.low) / _NORMAL_95)
    return Recommendation(
        kind=policy.BASELINE if cell is table.baseline else policy.CELL,
        cell=cell,
        trial=_median(cell, study.objective.sign),
        why=use_sentence(study, found, scale),
        evidence=Evidence(
            fmean(values.values()), tuple(values), fmean(shared) if shared else 0.0, believed
        ),
        over_baseline=None,
        compared=found.completed,
        rivals=tuple(
            named[other.cell].name
            for other in found.ranking[1:]
            if study.objective.sign * (other.score.mean - use.score.mean) > -study.objective.margin
        ),
        to_know_more=left_sentence(study, found, scale),
        more_trials=0,
        combination=None,
        known_against=(),
        warnings=tuple(_left_out(table)),
    )


def as_asked(table: StudyTable, levels: Mapping[str, str]) -> Recommendation:
    """The cell of these levels, with what is known against it.

    Raises:
        AnalysisError: it has no completed run.
    """
    cell = table.cell(levels)
    if cell is None or not cell.values():
        ran = "; ".join(other.name for other in table.cells if other.values())
        raise AnalysisError(
            f"no completed run of the cell {dict(levels)}. Cells with one: {ran or 'none'}"
        )
    goal = table.study.objective
    usual = recommend(table)
    known = list(known_against(table, cell))
    if usual.cell is None:
        known.append(usual.why.rstrip("."))
    elif usual.cell.levels != cell.levels:
        known.append(f"{usual.cell.name} is what the study recommends")
    seeds = tuple(row.seed for row in cell.trials if row.value is not None)
    mean = fmean(cell.values())
    base = {row.seed: row.value for row in table.baseline.trials if row.value is not None}
    shared = [row for row in cell.trials if row.value is not None and row.seed in base]
    gain = fmean(goal.sign * ((r.value or 0.0) - base[r.seed]) for r in shared) if shared else 0.0
    return Recommendation(
        kind=ASKED,
        cell=cell,
        trial=_median(cell, goal.sign),
        why=f"As asked: {cell.name}, {goal.metric} {scale_of(table.study, ()).value(mean)} over "
        f"its {counted(len(seeds), 'completed run')}.",
        evidence=Evidence(mean, seeds, gain, None),
        over_baseline=None,
        compared=1,
        rivals=(),
        to_know_more="",
        more_trials=0,
        combination=None,
        known_against=tuple(known),
        warnings=(),
    )


def with_seed(found: Recommendation, seed: int) -> Recommendation:
    """The same cell by its run of another seed.

    Raises:
        AnalysisError: that run has not completed.
    """
    trials = found.cell.trials if found.cell else ()
    mine = [row for row in trials if row.seed == seed and row.value is not None]
    if not mine:
        ran = ", ".join(str(row.seed) for row in trials if row.value is not None)
        name = found.cell.name if found.cell else "nothing"
        raise AnalysisError(f"{name} has no completed run with seed {seed}; it has {ran}")
    return replace(found, trial=mine[0])


def known_against(table: StudyTable, cell: CellRow) -> list[str]:
    """Why a cell is not handed out, in clauses; empty if nothing is known against it."""
    found = withheld(table.study, dict(cell.levels))
    ran = len(cell.trials)
    for state, what in ((Outcome.DIVERGED, "diverged"), (Outcome.FAILED, "failed")):
        if gone := cell.count(state):
            found.append(f"{gone} of its {counted(ran, 'run')} {what}")
    return found


# --------------------------------------------------------------------------- in words


def _why(
    table: StudyTable,
    choice: Choice,
    named: Mapping[Cell, CellRow],
    over: Contrast | None,
    rivals: list[str],
) -> str:
    """What to use, how good it is, how sure that is, and what happened to the combination."""
    assert choice.cell is not None and choice.evidence is not None
    scale = scale_of(table.study, ())
    found, name = choice.evidence, named[choice.cell].name
    name = "the baseline" if name == "baseline" else name
    text = f"Use {name}: {table.study.objective.metric} {scale.value(found.mean)} over "
    text += f"{counted(len(found.seeds), 'seed')}"
    if choice.kind == policy.BASELINE:
        whole = (
            " of which all runs completed"
            if any(known_against(table, other) for other in table.cells)
            else ""
        )
        text += f". No other setting{whole} is believed to be better than it."
    else:
        text += f", {_amount(scale, found.gain)} better than the baseline. "
        text += _how_sure(table, choice, over, scale)
    if choice.kind != policy.COMBINATION and choice.combined is not None:
        assert choice.combination is not None
        changes = _listed(table, choice.combination)
        text += (
            f" Together the changes that looked better alone ({changes}) "
            f"gave {scale.value(choice.combined.mean)}, which is not better."
        )
    others = [other for other in rivals if other != "baseline"]
    if others:
        more = f"; {len(others) - MOST_NAMES} more" if len(others) > MOST_NAMES else ""
        text += f" Not told apart from it: {'; '.join(others[:MOST_NAMES])}{more}."
    return text


def _how_sure(table: StudyTable, choice: Choice, over: Contrast | None, scale: Scale) -> str:
    assert choice.evidence is not None
    believed = choice.evidence.believed
    text = ""
    if choice.kind == policy.COMBINATION:
        text = (
            "It puts together changes that looked better alone, and its own runs beat the "
            "baseline and every single change that is believed to be better. "
        )
    elif believed is not None:
        text = (
            f"Without the luck of having been chosen, {_amount(scale, believed.gain)} "
            f"(sd {_amount(scale, believed.sd)}) can be expected. "
        )
    elif table.baseline.count(Outcome.DIVERGED):
        text = f"The baseline itself diverged in {table.baseline.count(Outcome.DIVERGED)} runs. "
    else:
        text = "It is the best mean; how much of its lead is luck is not known. "
    if over is None or over.ci_adjusted is None:
        return text.rstrip()
    interval = f"difference {scale.interval(over.ci_adjusted)} {scale.unit}".rstrip()
    if over.verdict == verdict.MATTERS:
        return f"{text}It is shown to be better than the baseline ({interval})."
    if over.direction == "better":  # though not by so much that it matters
        by = "by" if over.verdict == verdict.NEGLIGIBLE else "perhaps by"
        sure = f"It is shown to be better than the baseline, {by} less than the margin"
        return f"{text}{sure} ({interval})."
    return f"{text}That it is better than the baseline is not shown ({interval}): no clear winner."


def _amount(scale: Scale, number: float) -> str:
    return f"{scale.delta(number).lstrip('+')} {scale.unit}".rstrip()


def _listed(table: StudyTable, cell: Cell) -> str:
    names = table.study.compared_baseline()
    return table.study.change_name(dict(zip(names, cell, strict=True)))


def _to_know_more(table: StudyTable, choice: Choice) -> tuple[str, int, Levels | None]:
    """(what it takes to know more, how many trials that is, the combination to be run)."""
    study = table.study
    for levels in table.combinations:
        row = table.cell(dict(levels))
        done = sum(trial.ended for trial in row.trials) if row is not None else 0
        left = len(table.baseline.trials) - done
        if left <= 0:
            continue
        name, trials = study.change_name(dict(levels)), counted(left, "trial")
        if done:
            text = f"{name} has not run on all seeds: `ablate confirm` runs the rest, {trials}."
        else:
            tuned = " after its own tuning" if study.candidates.levels else ""
            text = (
                f"Whether the changes that look better alone add up is not known: `ablate confirm` "
                f"runs {name} on the study's seeds{tuned}, {trials}."
            )
        return text, left, levels
    cells = len(choice.compared)
    if cells < 2 or study.sequential is not None:
        return "", 0, None
    text = f"To know more, add a seed: {counted(cells, 'trial')} for the compared settings."
    return text, cells, None


def _passed_over(
    table: StudyTable, chosen: Evidence, against: Mapping[Levels, list[str]]
) -> list[str]:
    """Settings with a better mean that are not handed out, and why."""
    sign, scale = table.study.objective.sign, scale_of(table.study, ())
    found = []
    for cell in table.cells:
        why = against[cell.levels]
        if why and cell.mean is not None and sign * cell.mean > sign * chosen.mean:
            found.append(
                f"{cell.name} has a better mean, {scale.value(cell.mean)}, and is not handed out: "
                f"{'; '.join(why)}"
            )
    return found


def _left_out(table: StudyTable) -> list[str]:
    left = sum(not cell.trials or not all(r.scored for r in cell.trials) for cell in table.cells)
    if not left:
        return []
    return [
        f"{left} of {len(table.cells)} cells {are(left)} without a score for all seeds and "
        f"{'was' if left == 1 else 'were'} not compared"
    ]


def _nothing(table: StudyTable, why: str, then: str) -> Recommendation:
    return Recommendation(
        kind=policy.NOTHING,
        cell=None,
        trial=None,
        why=why,
        evidence=None,
        over_baseline=None,
        compared=0,
        rivals=(),
        to_know_more=then,
        more_trials=0,
        combination=None,
        known_against=(),
        warnings=tuple(_left_out(table)),
    )


def _why_nothing(table: StudyTable, against: Mapping[Levels, list[str]]) -> tuple[str, str]:
    known = [f"{c.name}: {against[c.levels][0]}" for c in table.cells if against[c.levels]]
    if known and len(known) == len(table.cells):
        return f"There is no setting to hand out: {'; '.join(known[:MOST_NAMES])}.", _ALL_THE_SAME
    why = "There is no setting to hand out yet: none whose trials have all ended with a score."
    return why, _LAUNCH


# --------------------------------------------------------------------------- parts


def _names(levels: Levels) -> tuple[str, ...]:
    return tuple(level for _, level in levels)


def _over_baseline(table: StudyTable, cell: CellRow) -> Contrast | None:
    """The cell against the baseline. It was chosen as the best of all, so all are judged at once,
    those that are not handed out too: the study's own verdict on it is no other one. A design that
    asks of some cells only has one of its own: where that is open, so is this.
    Dunnett's intervals against a control hold for the largest of them, too."""
    base, study = table.baseline, table.study
    if cell is base:
        return None
    results = [
        Result((("cell", one.name),), row.seed, row.state, row.value, row.id)
        for one in table.cells
        for row in one.trials
        if row.ended
    ]
    analysis = analyze_results(
        results,
        baseline={"cell": base.name},
        objective=objective_of(table),
        is_sequential=study.sequential is not None,
        first_look=study.sequential.min if study.sequential else None,
    )
    asked = _open_alone(table, cell) if isinstance(study.design, LeaveOneOut) else None
    return asked or analysis.contrast("cell", cell.name)


def _open_alone(table: StudyTable, cell: CellRow) -> Contrast | None:
    """The study's own comparison of one change made alone, where it is open."""
    usual = dict(table.baseline.levels)
    changed = [(factor, level) for factor, level in cell.levels if usual[factor] != level]
    alone = [question.analysis for question in questions(table) if question.key == "added"]
    if len(changed) != 1 or not alone:
        return None
    found = alone[0].contrast(*changed[0])
    return found if found.verdict == verdict.INCONCLUSIVE else None


def _median(cell: CellRow, sign: float) -> TrialRow:
    """The completed run in the middle; of two middle ones the worse."""
    ran = [row for row in cell.trials if row.value is not None]
    ran.sort(key=lambda row: (sign * (row.value or 0.0), row.seed))
    return ran[(len(ran) - 1) // 2]
