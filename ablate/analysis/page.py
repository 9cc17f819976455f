"""What a report says, as plain values: no HTML, no Markdown, no drawing.

The templates only lay these values out, so each format says the same.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ablate import design
from ablate.analysis import verdict
from ablate.analysis.analysis import Analysis, Contrast, analyze_results
from ablate.analysis.best import choose
from ablate.analysis.pareto import weigh
from ablate.analysis.results import Result
from ablate.analysis.scale import NONE, Scale, objective_of, plain_number, probability, scale_of
from ablate.analysis.sweep import Sweep, sweep_of
from ablate.analysis.table import StudyTable, TrialRow, name_settings
from ablate.errors import AnalysisError
from ablate.study import (
    FractionalFactorial,
    LeaveOneOut,
    OneAtATime,
    PlackettBurman,
    Search,
    SequentialSeeds,
    Study,
)
from ablate.trial import Levels, Outcome

MOST_SEEDS = 50
"""More seeds than this are not proposed."""
_DESIGN_WORDS = {
    "one_at_a_time": "one at a time: the baseline, and every other level alone",
    "full_factorial": "full factorial: every combination of levels",
    "fractional_factorial": "fractional factorial: a balanced part of all combinations",
    "plackett_burman": "Plackett-Burman: a screen of many factors in few cells",
    "leave_one_out": "leave one out: each change of the target reverted, and each made alone",
    "ablation_path": "ablation path: one change a step, the best of those left",
    "search": "search: a sampler chose the cells",
}
_STATES = (*(str(outcome) for outcome in Outcome), "running", "waiting")


# --------------------------------------------------------------------------- questions


@dataclass(frozen=True, slots=True)
class Question:
    """One comparison that the design was made for."""

    key: str
    """Letters and dashes; part of ids and file columns."""
    title: str
    note: str
    reference: str
    """What every level is compared with."""
    analysis: Analysis


def questions(table: StudyTable) -> tuple[Question, ...]:
    """The study's comparisons, judged; none while nothing has ended."""
    study = table.study
    base = study.compared_baseline()
    tuned = _tuning_note(study)
    if isinstance(study.design, LeaveOneOut):
        return _leave_one_out(table, study.design.target, note=tuned and f"{tuned} ")
    listed = isinstance(study.design, (Search, FractionalFactorial, PlackettBurman))
    found = _judge(table, table.results, base, "additive" if listed else "auto")
    if found is None:
        return ()
    if not isinstance(study.design, Search):
        return (Question("baseline", "Against the baseline", tuned, "the baseline", found),)
    note = (
        "The cells were chosen by a search, so this is exploratory: read it as a ranking "
        "to be confirmed, not as a test."
    )
    over_all = Question("baseline", "Against the baseline", note, "the baseline", found)
    target = design.winner(study, table.results)
    if study.design.then != "leave_one_out" or target is None:
        return (over_all,)
    picked = (
        f"The target, {study.change_name(target)}, is the best cell that the search found on these "
        "same seeds, so part of its lead is luck. "
    )
    return (*_leave_one_out(table, target, note=picked), over_all)


def _leave_one_out(
    table: StudyTable, target: Mapping[str, str], *, note: str = ""
) -> tuple[Question, ...]:
    base = table.study.compared_baseline()
    target = {**base, **target}
    changed = [name for name in base if base[name] != target[name]]
    reverted = [target, *({**target, name: base[name]} for name in changed)]
    added = [base, *({**base, name: target[name]} for name in changed)]
    asked = []
    for key, title, words, cells, reference, against in (
        (
            "reverted",
            "Each change taken out of the target",
            f"{note}A change that can be reverted without loss is not needed, unless another one "
            "stands in for it: compare with the changes made alone.",
            reverted,
            target,
            "the target",
        ),
        ("added", "Each change made alone", "", added, base, "the baseline"),
    ):
        wanted = {tuple(levels.items()) for levels in cells}
        mine = [result for result in table.results if result.levels in wanted]
        found = _judge(table, mine, reference, "simple")
        if found is not None:
            asked.append(Question(key, title, words, against, found))
    return tuple(asked)


def _judge(
    table: StudyTable, results: Sequence[Result], reference: Mapping[str, str], estimand: str
) -> Analysis | None:
    study = table.study
    try:
        return analyze_results(
            results,
            baseline=reference,
            objective=objective_of(table),
            is_sequential=study.sequential is not None,
            first_look=study.sequential.min if study.sequential else None,
            is_exploratory=isinstance(study.design, Search),
            estimand=estimand,
            aliases=_main_aliases(study),
        )
    except AnalysisError:
        if results:
            raise
        return None


def _tuning_note(study: Study) -> str:
    if not study.candidates:
        return ""
    names = " and ".join(factor.name for factor in study.nuisance)
    tuned, own = study.tuning_seeds, study.seeds
    return (
        f"Each level stands at its own best {names}, the best of the same "
        f"{len(study.candidates)} candidates on {_seed_words(tuned)}. The choice is not judged by "
        f"the runs that made it: what is compared are new runs on {_seed_words(own)}. The "
        f"intervals speak of these settings; a finer choice of {names} could still move a level."
    )


def _seed_words(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


@dataclass(frozen=True, slots=True)
class ContrastRow:
    """One line of the table of effects, ready to print."""

    factor: str
    level: str
    reference: str
    role: str
    verdict: str
    delta: str
    interval: str
    adjusted: str
    """Simultaneous interval."""
    n: int
    p_adjusted: str
    diverged: str
    needs: str
    sentence: str
    warnings: tuple[str, ...]
    survivors: bool
    """The difference is between runs that did not diverge only."""


def contrast_rows(table: StudyTable, question: Question, scale: Scale) -> tuple[ContrastRow, ...]:
    """The comparisons of one question; those of tuned cells say at which settings they stand."""
    chosen = _chosen_settings(table)
    return tuple(
        _contrast_row(contrast, scale, _stands_at(contrast, question.analysis.baseline, chosen))
        for contrast in question.analysis.contrasts
    )


def _chosen_settings(table: StudyTable) -> dict[Levels, str]:
    """Levels of what is compared -> the nuisance settings that were chosen for them."""
    chosen = {}
    for row in table.tuning:
        if row.best is not None:
            levels = row.candidates[row.best].levels
            chosen[table.study.compared_levels(levels)] = name_settings(table.study, levels)
    return chosen


def _stands_at(contrast: Contrast, base: Mapping[str, str], chosen: Mapping[Levels, str]) -> str:
    """One sentence; empty where the two sides are not one cell each."""
    if contrast.estimand != "simple":
        return ""
    mine, its = (
        chosen.get(tuple({**base, contrast.factor: level}.items()))
        for level in (contrast.level, contrast.reference)
    )
    if mine is None or its is None:
        return ""
    if mine == its:
        return f" Best for both: {mine}."
    return f" {contrast.level} stands at its best {mine}, {contrast.reference} at {its}."


def _contrast_row(contrast: Contrast, scale: Scale, stands_at: str) -> ContrastRow:
    diverged, runs = contrast.diverged
    return ContrastRow(
        factor=contrast.factor,
        level=contrast.level,
        reference=contrast.reference,
        role=verdict_role(contrast),
        verdict=verdict_words(contrast),
        delta=scale.delta(contrast.delta),
        interval=scale.interval(contrast.ci),
        adjusted=scale.interval(contrast.ci_adjusted),
        n=contrast.n,
        p_adjusted=probability(contrast.p_adjusted),
        diverged=f"{diverged}/{runs}" if runs else NONE,
        needs=_needs(contrast),
        sentence=contrast.sentence + stands_at,
        warnings=contrast.warnings,
        survivors=contrast.delta is not None
        and contrast.divergence is not None
        and contrast.divergence.any,
    )


def verdict_role(contrast: Contrast) -> str:
    if contrast.verdict == verdict.MATTERS:
        return "worse" if contrast.direction == "worse" else "better"
    return "open" if contrast.verdict == verdict.INCONCLUSIVE else "same"


def verdict_words(contrast: Contrast) -> str:
    if contrast.verdict == verdict.MATTERS and contrast.direction:
        return f"matters, {contrast.direction}"
    return contrast.verdict.lower()


def _needs(contrast: Contrast) -> str:
    if contrast.verdict != verdict.INCONCLUSIVE:
        return ""
    if contrast.needs_seeds is None or contrast.needs_seeds > MOST_SEEDS:
        return f"> {MOST_SEEDS}"
    return f"+{contrast.needs_seeds}"


# --------------------------------------------------------------------------- instability


@dataclass(frozen=True, slots=True)
class InstabilityRow:
    cell: str
    runs: int
    verdicts: tuple[tuple[str, int], ...]
    """(the markers' verdict on a run, runs), worst first."""
    counts: tuple[str, ...]
    """By marker: "events in runs", or empty."""
    first: str
    """First event of all seeds: its marker and step."""
    flags: str


@dataclass(frozen=True, slots=True)
class Instability:
    markers: tuple[str, ...]
    rows: tuple[InstabilityRow, ...]
    """Cells in which a marker saw something."""
    calm: int
    """Cells in which none did."""


_VERDICT_ORDER = ("NUMERIC_FAIL", "DIVERGED", "COLLAPSED", "DEGRADED", "SPIKY", "STABLE")


def instability(table: StudyTable) -> Instability:
    """Where training was not calm."""
    markers = sorted({str(event["marker"]) for row in table.rows for event in row.events})
    rows, calm = [], 0
    for cell in table.everything:
        ran = [row for row in cell.trials if row.ended]
        events = [(event, row) for row in ran for event in row.events]
        flags = sorted({flag for row in ran for flag in row.flags})
        if not events and not flags and all(row.verdict in ("", "STABLE") for row in ran):
            calm += bool(ran)
            continue
        counts = []
        for marker in markers:
            mine = [row.id for event, row in events if event["marker"] == marker]
            counts.append(f"{len(mine)} in {len(set(mine))}" if mine else "")
        first = min(events, key=lambda item: item[0]["first_step"], default=None)
        tally = Counter(row.verdict for row in ran if row.verdict)
        rows.append(
            InstabilityRow(
                cell=cell.name,
                runs=len(ran),
                verdicts=tuple(sorted(tally.items(), key=lambda item: _severity(item[0]))),
                counts=tuple(counts),
                first=f"step {first[0]['first_step']}, seed {first[1].seed}" if first else "",
                flags=", ".join(flags),
            )
        )
    return Instability(tuple(markers), tuple(rows), calm)


def _severity(name: str) -> int:
    return _VERDICT_ORDER.index(name) if name in _VERDICT_ORDER else len(_VERDICT_ORDER)


# --------------------------------------------------------------------------- what next


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do next, and what to write or type for it."""

    text: str
    code: str = ""


def open_questions(asked: Sequence[Question]) -> tuple[str, ...]:
    """What was not decided, each in a sentence."""
    found = []
    for question in asked:
        for contrast in question.analysis.contrasts:
            if contrast.verdict == verdict.INCONCLUSIVE:
                found.append(f"{contrast.factor}: {contrast.sentence}")
        found += question.analysis.not_estimable
    return tuple(dict.fromkeys(found))


def next_steps(table: StudyTable, asked: Sequence[Question], scale: Scale) -> tuple[Step, ...]:
    """What the next run should be, most useful first."""
    study = table.study
    launch = f"ablate launch {_file(study)}"
    steps = []
    waiting = table.count("waiting") + table.count("running")
    if waiting:
        steps.append(
            Step(
                f"{_count(waiting, 'trial')} of this study {_are(waiting)} still to be "
                "run; launching again runs just these.",
                launch,
            )
        )
    gone = [row for row in table.rows if row.ended and not Outcome(row.state).answered]
    if gone:
        steps.append(
            Step(
                f"{_count(len(gone), 'trial')} ended without a score and {_are(len(gone))} left "
                "out: "
                + ", ".join(f"{row.id} ({row.state})" for row in gone[:8])
                + (" and more" if len(gone) > 8 else "")
                + ". They say nothing about their setting; the reasons are under Cost."
            )
        )
    steps += _wider(table)
    steps += _more_seeds(study, asked)
    steps += _combine(study, asked)
    return tuple(steps)


def _wider(table: StudyTable) -> list[Step]:
    """Where the best candidate of a nuisance setting is the last one of those tried."""
    found = [(row.name, edge) for row in table.tuning for edge in row.edges(table.study)]
    if not found:
        return []
    listed = "; ".join(
        f"{name}: {setting}={value} is the {end}" for name, (setting, value, end) in found[:6]
    )
    more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
    return [
        Step(
            f"The best candidate lies at the edge of those tried ({listed}{more}). A level may be "
            "better still beyond it: widen nuisance.settings. Finished trials are kept."
        )
    ]


def _more_seeds(study: Study, asked: Sequence[Question]) -> list[Step]:
    open_ = [c for q in asked for c in q.analysis.contrasts if c.verdict == verdict.INCONCLUSIVE]
    wanted = sorted(number for c in open_ if 0 < (number := c.needs_seeds or 0) <= MOST_SEEDS)
    steps = []
    if wanted and study.sequential is None:
        few, most = wanted[0], wanted[-1]
        kind = "comparison" if len(open_) == 1 else "comparisons"
        text = f"About {_count(few, 'more seed')} would decide {wanted.count(few)} of {len(open_)} "
        text += f"open {kind}"
        text += f", {most} would decide {len(wanted)}." if most > few else "."
        last = max(study.seeds)
        seeds = [*study.seeds, *range(last + 1, last + 1 + few)]
        steps.append(Step(text + " Finished trials are kept.", f"seeds: {seeds}"))
        # Sequential seeds count from 0, and only such seeds are already there.
        reusable = study.seeds == tuple(range(len(study.seeds)))
        if reusable and len(open_) < sum(len(q.analysis.contrasts) for q in asked):
            top = max(len(study.seeds) + most, 3)
            steps.append(
                Step(
                    "To spend seeds on the open comparisons only, and stop as each is decided:",
                    f"seeds: {{min: {max(2, len(study.seeds))}, max: {top}, until: decided}}",
                )
            )
    hopeless = [c for c in open_ if c.n and (c.needs_seeds is None or c.needs_seeds > MOST_SEEDS)]
    if hopeless:
        names = ", ".join(f"{c.factor}={c.level}" for c in hopeless[:6])
        more = " and others" if len(hopeless) > 6 else ""
        steps.append(
            Step(
                f"More seeds are a poor way to decide {names}{more}: it would take more than "
                f"{MOST_SEEDS}, since the estimate lies close to the margin or to nothing. "
                "Accept either setting, widen the margin, or ask it where the effect is larger."
            )
        )
    return steps


def _combine(study: Study, asked: Sequence[Question]) -> list[Step]:
    """After one factor at a time: do the gains add up?"""
    if not isinstance(study.design, OneAtATime) or not asked:
        return []
    best: dict[str, Contrast] = {}
    sign = study.objective.sign
    for contrast in asked[0].analysis.contrasts:
        if contrast.verdict != verdict.MATTERS or contrast.direction != "better":
            continue
        before = best.get(contrast.factor)
        gain = sign * (contrast.delta or 0.0)
        if before is None or gain > sign * (before.delta or 0.0):
            best[contrast.factor] = contrast
    if len(best) < 2:
        return []
    target = {name: contrast.level for name, contrast in best.items()}
    return [
        Step(
            f"{_count(len(target), 'change')} {'are' if len(target) > 1 else 'is'} better alone. "
            "Whether the gains add up, and which are still needed together, is not known from "
            "this design:",
            f"design: {{name: leave_one_out, target: {json.dumps(target, ensure_ascii=False)}}}",
        )
    ]


def _file(study: Study) -> str:
    return study.path.replace("\\", "/").rsplit("/", 1)[-1]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


# --------------------------------------------------------------------------- the rest


@dataclass(frozen=True, slots=True)
class CellView:
    name: str
    mean: str
    """Of completed runs."""
    spread: str
    score: str
    """Mean with diverged runs at chance; needs every seed to have ended with a score."""
    runs: str
    """completed, diverged and others, in words."""
    values: tuple[tuple[int, str], ...]
    """(seed, value or outcome)."""


def cell_views(table: StudyTable, scale: Scale) -> tuple[CellView, ...]:
    return tuple(
        CellView(
            cell.name,
            scale.value(cell.mean),
            scale.delta(cell.spread).lstrip("+") if cell.spread is not None else NONE,
            scale.value(cell.score(table.chance)),
            ", ".join(f"{cell.count(s)} {s}" for s in _STATES if cell.count(s)),
            tuple(
                (row.seed, scale.value(row.value) if row.value is not None else row.state)
                for row in cell.trials
            ),
        )
        for cell in table.cells
    )


@dataclass(frozen=True, slots=True)
class TrialView:
    id: str
    cell: str
    seed: int
    state: str
    value: str
    best: str
    verdict: str
    flags: str
    events: str
    reason: str


def trial_views(table: StudyTable, scale: Scale, rows: Iterable[TrialRow]) -> tuple[TrialView, ...]:
    views = []
    for row in rows:
        tally = Counter(str(event["marker"]) for event in row.events)
        best = NONE
        if row.best is not None and row.best_epoch is not None:
            best = f"{scale.value(row.best)} (epoch {row.best_epoch:g})"
        views.append(
            TrialView(
                id=row.id,
                cell=table.study.change_name(dict(row.levels)),
                seed=row.seed,
                state=row.state,
                value=scale.value(row.value),
                best=best,
                verdict=row.verdict,
                flags=", ".join(row.flags),
                events=", ".join(f"{count} {marker}" for marker, count in sorted(tally.items())),
                reason=row.reason,
            )
        )
    return tuple(views)


@dataclass(frozen=True, slots=True)
class CostRow:
    cell: str
    hours: str
    speed: str
    memory: str
    attempts: int
    crashes: int


@dataclass(frozen=True, slots=True)
class CostView:
    unit: str
    """accelerator-hours, or worker-hours on CPUs."""
    total: str
    lost: str
    attempts: int
    crashes: int
    rows: tuple[CostRow, ...]
    trade: str
    """Label of what the score is weighed against; empty where there is nothing to trade."""
    front: tuple[tuple[str, str, str], ...]
    """(cell, cost, score) of the cells that nothing beats in both, cheapest first."""
    weighed: int
    """Cells that were weighed."""
    asked: bool
    """The study's objective names the cost, so the front is its answer."""
    troubles: tuple[tuple[str, str, str], ...]
    """(trial, cell, what happened) of trials that ended without a score."""
    folder: str
    root: str
    path: str


def cost_view(table: StudyTable, folder: str, scale: Scale) -> CostView:
    """What the study took, on which machines' account; differs between equal studies."""
    trade = weigh(table)
    rows = []
    for cell in table.everything:
        costs = [row.cost for row in cell.trials if row.cost.attempts]
        if not costs:
            continue
        speeds = [cost.samples_per_s for cost in costs if cost.samples_per_s]
        memory = [cost.peak_memory_gib for cost in costs if cost.peak_memory_gib]
        rows.append(
            CostRow(
                cell.name,
                plain_number(sum(cost.worker_hours for cost in costs)),
                f"{median(speeds):,.0f}" if speeds else NONE,
                plain_number(max(memory)) if memory else NONE,
                sum(cost.attempts for cost in costs),
                sum(cost.crashes for cost in costs),
            )
        )
    everything = [row.cost for row in table.rows]
    unscored = [row.cost for row in table.rows if row.ended and not row.scored]
    study = table.study
    return CostView(
        unit="accelerator-hours" if study.gang.gpus_per_worker else "worker-hours",
        total=plain_number(sum(cost.worker_hours for cost in everything)),
        lost=plain_number(sum(cost.worker_hours for cost in unscored)),
        attempts=sum(cost.attempts for cost in everything),
        crashes=sum(cost.crashes for cost in everything),
        rows=tuple(rows),
        trade=trade.label if trade else "",
        front=tuple(
            (point.cell.name, plain_number(point.cost), scale.value(point.score))
            for point in (trade.front if trade else ())
        ),
        weighed=len(trade.points) if trade else 0,
        asked=study.objective.cost is not None,
        troubles=tuple(
            (row.id, cell.name, row.cost.trouble)
            for cell in table.everything
            for row in cell.trials
            if row.cost.trouble
        ),
        folder=folder,
        root=study.root,
        path=study.path,
    )


@dataclass(frozen=True, slots=True)
class TuningView:
    """The choice of the nuisance settings of one compared cell, ready to print."""

    name: str
    candidates: tuple[tuple[str, str, bool], ...]
    """(settings, score or what is missing, whether it was chosen)."""
    chosen: str


def tuning_views(table: StudyTable, scale: Scale) -> tuple[TuningView, ...]:
    views = []
    for row in table.tuning:
        settings = [name_settings(table.study, cell.levels) for cell in row.candidates]
        words = [
            scale.value(score) if score is not None and math.isfinite(score) else
            ("no score" if score is not None else "not ended")
            for score in row.scores
        ]  # fmt: skip
        views.append(
            TuningView(
                row.name,
                tuple(
                    (setting, word, i == row.best)
                    for i, (setting, word) in enumerate(zip(settings, words, strict=True))
                ),
                NONE if row.best is None else settings[row.best],
            )
        )
    return tuple(views)


@dataclass(frozen=True, slots=True)
class Page:
    """Everything a report says, but for what it cost."""

    name: str
    question: tuple[str, ...]
    """Paragraphs of the study file's header comment."""
    facts: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, int], ...]
    """(state, trials), ended ones first."""
    partial: str
    """Why this is not the last word; empty when it is."""
    questions: tuple[Question, ...]
    scale: Scale
    contrasts: Mapping[str, tuple[ContrastRow, ...]]
    """By the question's key."""
    unasked: tuple[str, ...]
    """Factors of the study without any result yet."""
    instability: Instability
    sweep: Sweep | None
    """Of a search."""
    open: tuple[str, ...]
    next: tuple[Step, ...]
    cells: tuple[CellView, ...]
    trials: tuple[TrialView, ...]
    foreign: tuple[TrialView, ...]
    config: tuple[tuple[str, str, bool], ...]
    """(field, value, written in the study file)."""
    factors: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    """(factor, baseline level, ((level, fields), ...))."""
    design_rows: tuple[tuple[str, ...], ...]
    """Signs of each cell of a fraction, a factor a column; empty for other designs."""
    aliases: tuple[tuple[str, tuple[str, ...]], ...]
    """(effect, effects it cannot be told from)."""
    tuning: tuple[TuningView, ...]
    same: tuple[str, ...]
    """Which levels are provably one experiment, and what was done about it, in sentences."""
    best: tuple[str, tuple[str, ...]]
    """The best cell in a sentence, and warnings about it."""
    fingerprints: tuple[tuple[str, str], ...]
    noise: str
    silence: str
    """What is said in place of an answer."""
    metric: str
    text: str
    """The study file."""
    file: str

    @property
    def num_trials(self) -> int:
        return sum(number for _, number in self.counts)


def read_page(table: StudyTable) -> Page:
    """Judge and describe a study."""
    study = table.study
    asked = questions(table)
    scale = scale_of(study, (question.analysis for question in asked))
    counts = tuple((state, table.count(state)) for state in _STATES if table.count(state))
    return Page(
        name=study.name,
        question=header_comment(study.text),
        facts=_facts(table, scale),
        counts=counts,
        partial=_partial(table),
        questions=asked,
        scale=scale,
        contrasts={question.key: contrast_rows(table, question, scale) for question in asked},
        unasked=_unasked(study, asked),
        instability=instability(table),
        sweep=sweep_of(table),
        open=open_questions(asked),
        next=next_steps(table, asked, scale),
        cells=cell_views(table, scale),
        trials=trial_views(table, scale, table.rows),
        foreign=trial_views(table, scale, table.foreign),
        config=_config(study),
        factors=tuple(
            (
                factor.name,
                factor.baseline,
                tuple((level.name, _fields(level.fields)) for level in factor.levels)
                or ((f"{factor.range}", ""),),
            )
            for factor in study.factors
        ),
        design_rows=_design_rows(table),
        aliases=_alias_table(study),
        tuning=tuning_views(table, scale),
        same=tuple(design.repeats(study)),
        best=_best(table),
        fingerprints=_fingerprints(table.rows),
        metric=study.objective.metric,
        noise=_noise(asked, scale),
        silence=_silence(table),
        text=study.text,
        file=_file(study),
    )


def header_comment(text: str) -> tuple[str, ...]:
    """Paragraphs of the comment that a study file begins with: its question, in its own words."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.startswith("#"):
            if line.strip() or any(paragraphs):
                break
            continue
        words = line.lstrip("#").strip()
        if words:
            paragraphs[-1].append(words)
        elif paragraphs[-1]:
            paragraphs.append([])
    return tuple(" ".join(lines) for lines in paragraphs if lines)


def _facts(table: StudyTable, scale: Scale) -> tuple[tuple[str, str], ...]:
    study = table.study
    goal = study.objective
    margin = scale.delta(goal.margin).lstrip("+")
    unit = f" {scale.unit}" if scale.unit else ""
    better = "higher" if goal.direction == "maximize" else "lower"
    if study.sequential is None:
        seeds = ", ".join(map(str, study.seeds))
    else:
        seeds = _sequential_words(study.sequential)
    gang = f"{study.gang.workers} " + ("workers" if study.gang.workers > 1 else "worker")
    if study.gang.gpus_per_worker:
        gang += f" \N{MULTIPLICATION SIGN} {study.gang.gpus_per_worker} GPU"
    return (
        ("Judged by", f"{goal.metric} at the last step, {better} is better"),
        ("Margin", f"{margin}{unit}, fixed beforehand: smaller differences would not matter"),
        ("Chance", scale.value(table.chance) if table.chance is not None else "not known here"),
        ("Design", _DESIGN_WORDS[study.design.name]),
        ("Cells", str(len(table.cells))),
        ("Seeds", seeds),
        *_tuning_fact(study),
        ("Trained on", gang),
        ("Recipe", study.recipe),
    )


def _tuning_fact(study: Study) -> tuple[tuple[str, str], ...]:
    if not study.candidates:
        return ()
    tried = "; ".join(
        ", ".join(f"{name}={level}" for name, level in levels.items())
        for levels in study.candidates
    )
    return (("Tuned inside every cell", f"{tried}, on {_seed_words(study.tuning_seeds)}"),)


def _sequential_words(seeds: SequentialSeeds) -> str:
    return f"{seeds.min} to {seeds.max}, added until each comparison is decided"


def _partial(table: StudyTable) -> str:
    waiting, running = table.count("waiting"), table.count("running")
    parts = []
    if running:
        parts.append(f"{running} running or interrupted")
    if waiting:
        parts.append(f"{waiting} waiting")
    text = ""
    if parts:
        left = waiting + running
        text = f"{_count(left, 'trial')} of {len(table.rows)} {_are(left)} not there yet: " + (
            " and ".join(parts) + ". What follows speaks of the rest."
        )
    aside = ""
    if table.foreign:
        number = len(table.foreign)
        aside = (
            f"{_count(number, 'trial')} in the folder {_are(number)} not of this study any more "
            "(the baseline, a level, a seed or the recipe changed) and "
            f"{'takes' if number == 1 else 'take'} no part."
        )
    return " ".join(part for part in (text, table.open_ended, aside) if part)


def _silence(table: StudyTable) -> str:
    tuned = sum(row.best is not None for row in table.tuning)
    if any(row.ended for row in table.rows) and table.tuning:
        names = " and ".join(factor.name for factor in table.study.nuisance)
        return (
            f"The {names} of {tuned} of {len(table.tuning)} cells is chosen; no trial that is "
            "compared has ended yet."
        )
    return "No trial has ended yet, so there is nothing to say."


def _config(study: Study) -> tuple[tuple[str, str, bool], ...]:
    config = study.config(study.cell({}), seed=study.seeds[0])
    return tuple(
        (name, _compact(value), name in study.baseline)
        for name, value in config.items()
        if name != "seed"
    )


def _best(table: StudyTable) -> tuple[str, tuple[str, ...]]:
    """The best cell in a sentence, and what is to be known against it; empty without one."""
    try:
        choice = choose(table)
    except AnalysisError:
        return "", ()
    return choice.sentence, choice.warnings


def _unasked(study: Study, asked: Sequence[Question]) -> tuple[str, ...]:
    known = {contrast.factor for question in asked for contrast in question.analysis.contrasts}
    return tuple(factor.name for factor in study.compared if asked and factor.name not in known)


def _confounded(study: Study) -> dict[str, dict[str, float]]:
    """Effect -> what it cannot be told from, with weights; for fractions only."""
    found = design.fraction(study)
    return {} if found is None else found.aliases()


def _alias_table(study: Study) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Effects that are one effect to this design; partly confounded ones are counted."""
    rows = []
    seen: set[frozenset[str]] = set()
    for effect, others in _confounded(study).items():
        whole = sorted(name for name, weight in others.items() if abs(weight) > 1 - 1e-9)
        part = len(others) - len(whole)
        if whole and frozenset((effect, *whole)) not in seen:
            seen.add(frozenset((effect, *whole)))
            rows.append((effect, tuple(whole)))
        if part and " x " not in effect:
            rows.append((effect, (f"partly, {_count(part, 'pair')} of other factors",)))
    return tuple(rows)


def _main_aliases(study: Study) -> dict[str, list[str]]:
    """Factor -> effects that are wholly confounded with it."""
    confounded = _confounded(study)
    return {
        factor.name: sorted(n for n, w in confounded[factor.name].items() if abs(w) > 1 - 1e-9)
        for factor in study.factors
        if confounded.get(factor.name)
    }


def _design_rows(table: StudyTable) -> tuple[tuple[str, ...], ...]:
    if not isinstance(table.study.design, (FractionalFactorial, PlackettBurman)):
        return ()
    usual = table.study.compared_baseline()
    return tuple(
        tuple("\N{MINUS SIGN}" if level == usual[name] else "+" for name, level in cell.levels)
        for cell in table.cells
    )


def _fields(fields: Levels | tuple[tuple[str, Any], ...]) -> str:
    return ", ".join(f"{name}: {_compact(value)}" for name, value in fields)


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _fingerprints(rows: Iterable[TrialRow]) -> tuple[tuple[str, str], ...]:
    """Code, versions and data; a value that differs between trials is listed with all it was."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        for name, value in _flatten(row.fingerprint or {}, ""):
            values = seen.setdefault(name, [])
            if value not in values:
                values.append(value)
    return tuple((name, " | ".join(sorted(values))) for name, values in sorted(seen.items()))


def _flatten(content: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _compact(value)


def _noise(asked: Sequence[Question], scale: Scale) -> str:
    """What the seed alone changes, in a sentence."""
    if not asked:
        return ""
    noise = asked[0].analysis.noise
    if noise.sigma_seed is None:
        return "With one seed nothing is known about noise."
    unit = f" {scale.unit}" if scale.unit else ""
    text = f"The seed alone moves a run by {scale.delta(noise.sigma_seed).lstrip('+')}{unit} (sd)"
    if noise.sigma_residual is not None:
        text += (
            f"; comparing runs of the same seed leaves "
            f"{scale.delta(noise.sigma_residual).lstrip('+')}{unit}"
        )
    return text + "."
