"""The table that every analysis starts from: each trial of a study folder, as the study sees it.

A folder may hold more than the study asks today (a level was removed, the baseline changed) and
less (a trial is still to be run). Both are told: trials that the study would no longer resolve to
are `foreign` and take no part, trials that it wants and that have no outcome are in the table.

What depends on machines and luck (wall time, attempts, crash logs) is kept in `Cost` and nowhere
else, so that a study that was interrupted gives the same table as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from ablate.analysis.results import Result
from ablate.errors import DataError, PlanError
from ablate.records.folder import StudyRecord, TrialRecord, interrupted, worker_seconds
from ablate.study import Search, Study, design
from ablate.study.results import cost_of, judged
from ablate.trial.identity import Cell, Levels, Outcome, Trial
from ablate.trial.recipe import chance_of, load
from ablate.trial.speed import data_wait, slowed_cards

CURVE_POINTS = 200
"""Points that a curve of step measurements is thinned to: more than a printed panel resolves."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Numbers over training, finite ones only."""

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """What a trial took: facts about machines, never part of a comparison."""

    wall_s: float = 0.0
    """Wall time of all attempts."""
    worker_hours: float = 0.0
    """Wall time times the workers of each attempt: accelerator-hours on accelerators."""
    attempts: int = 0
    crashes: int = 0
    """Attempts that a machine or process ended."""
    interrupted: Mapping[str, float] = field(default_factory=dict)
    """What machines that were taken away, or broke, cost
    (:func:`ablate.records.folder.interrupted`)."""
    samples_per_s: float | None = None
    """Median over steps, all ranks together."""
    data_wait: float | None = None
    """Share of its steps' time that waited for data."""
    slowed: tuple[str, ...] = ()
    """Its accelerators that lowered their clocks, with why."""
    mfu: float | None = None
    """Share of its accelerators' bf16 peak that the model's own operations take
    (:mod:`ablate.training.flops`); None where it is not known."""
    peak_memory_gib: float | None = None
    weighed: float | None = None
    """What the objective is weighed against (`objective.cost`, else gpu_hours), if completed."""
    trouble: str = ""
    """Why a trial without a score ended, with the tail of its log."""


UNENDED = ("running", "interrupted", "waiting")
"""States of trials without an outcome: attempted now, attempted and not now, never attempted."""


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial: what it stands for and what came of it."""

    id: str
    levels: Levels
    """(factor, level) of every factor of the study, in its order."""
    seed: int
    state: str
    """An outcome, or one of :data:`UNENDED`."""
    value: float | None = None
    """The objective, where the study wants it (`objective.at`), of a completed trial."""
    best: float | None = None
    """The best value of the objective at any evaluation; never used for a verdict."""
    best_epoch: float | None = None
    images: int | None = None
    """Images that the objective is a share of, where the evaluation says so."""
    step: int = 0
    """Optimizer steps completed."""
    verdict: str = ""
    """How the markers call the run's course."""
    flags: tuple[str, ...] = ()
    learning: str = ""
    """What a look at its weights says: learning | not learning | collapsed | undecided; or "".
    "nothing added" is said in the place of "not learning" of a run that began with given weights,
    in which it was learnt before."""
    reason: str = ""
    """What the run itself gave as its reason to end, when it did not complete."""
    events: tuple[Mapping[str, Any], ...] = ()
    score: Curve = Curve()
    """Objective over epochs."""
    loss: Curve = Curve()
    """Training loss over steps, thinned."""
    peaks: tuple[float | None, ...] = ()
    """Loss at each event's last step, to draw it; None where it was not finite."""
    config: Mapping[str, Any] | None = None
    """The resolved configuration."""
    fingerprint: Mapping[str, Any] | None = None
    """Code, data and versions, as recorded when the trial was written."""
    cost: Cost = Cost()

    @property
    def ended(self) -> bool:
        return self.state not in UNENDED

    @property
    def scored(self) -> bool:
        return self.ended and Outcome(self.state).scored

    def result(self, levels: Levels | None = None) -> Result:
        """The trial as the statistics read it, standing for `levels`."""
        return Result(
            levels=levels or self.levels,
            seed=self.seed,
            outcome=self.state,
            value=self.value,
            trial_id=self.id,
            verdict=self.verdict,
            flags=self.flags,
        )


@dataclass(frozen=True, slots=True)
class CellRow:
    """One cell over its seeds."""

    levels: Levels
    name: str
    """What differs from the baseline."""
    trials: tuple[TrialRow, ...]
    """By seed."""

    def values(self) -> list[float]:
        return [row.value for row in self.trials if row.value is not None]

    @property
    def mean(self) -> float | None:
        """Mean of the completed runs: survivors only, if any diverged."""
        values = self.values()
        return fmean(values) if values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over completed seeds."""
        values = self.values()
        return stdev(values) if len(values) > 1 else None

    def count(self, state: str) -> int:
        return sum(row.state == state for row in self.trials)

    def score(self, chance: float | None) -> float | None:
        """Mean with diverged runs at chance; None unless every seed of the block has a score."""
        if not self.trials or not all(row.scored for row in self.trials):
            return None
        scores = [chance if row.state == Outcome.DIVERGED else row.value for row in self.trials]
        known = [score for score in scores if score is not None]
        return fmean(known) if len(known) == len(self.trials) else None


@dataclass(frozen=True, slots=True)
class TuningRow:
    """How the nuisance settings of one compared cell were chosen."""

    name: str
    """What differs from the baseline in what is compared."""
    candidates: tuple[CellRow, ...]
    """The cell with each candidate, on the tuning seeds alone."""
    scores: tuple[float | None, ...]
    best: int | None
    """Place of the chosen candidate; None while one is still to end."""

    def edges(self, study: Study) -> tuple[tuple[str, str, str], ...]:
        """(setting, chosen value, largest or smallest) where the best is the last that was tried.

        The true best may lie beyond it.
        """
        if self.best is None:
            return ()
        found = []
        chosen = dict(self.candidates[self.best].levels)
        for factor in study.nuisance:
            try:
                tried = sorted({float(levels[factor.name]) for levels in study.candidates.levels})
                value = float(chosen[factor.name])
            except ValueError:
                continue  # no order among names
            if len(tried) > 1 and value in (tried[0], tried[-1]):
                end = "smallest" if value == tried[0] else "largest"
                found.append((factor.name, chosen[factor.name], end))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class StudyTable:
    """Every trial of a study, cell by cell, in the order of the design."""

    study: Study
    record: StudyRecord
    trials: tuple[Trial, ...]
    """Those of the folder that the study still wants."""
    cells: tuple[CellRow, ...]
    """What is compared. With nuisance settings: each cell at its own best, on the study's seeds,
    under the levels of the compared factors alone."""
    tuning: tuple[TuningRow, ...]
    """How these were chosen; empty without nuisance settings."""
    results: tuple[Result, ...]
    """Ended trials as the statistics read them; one run may stand in several cells."""
    foreign: tuple[TrialRow, ...]
    """Trials in the folder that are not of this study any more."""
    chance: float | None
    """The objective's value by guessing; None when the data are not here to count classes."""
    combinations: tuple[Levels, ...] = ()
    """The cells that confirm the study, run or not: all changes that look better alone, and what
    was handed out so with fewer seeds. Without those that the design has; none before every trial
    has ended."""
    added: frozenset[Levels] = frozenset()
    """Cells that were run and are not of the design; no comparison is made with them."""
    asked: tuple[Levels, ...] = ()
    """The cells in the order in which they were first asked for, by their files' times."""
    open_ended: str = ""
    """Why more trials may follow those listed (a search or a path under way)."""

    @property
    def images(self) -> int | None:
        """Images that every score is a share of; None where they are not the same in all runs."""
        seen = {row.images for row in self.rows if row.state == Outcome.COMPLETED}
        return next(iter(seen)) if len(seen) == 1 else None

    @property
    def everything(self) -> tuple[CellRow, ...]:
        """The cells, and those that were only tried in tuning."""
        return (*self.cells, *(cell for row in self.tuning for cell in row.candidates))

    @property
    def rows(self) -> tuple[TrialRow, ...]:
        return tuple(row for cell in self.everything for row in cell.trials)

    @property
    def baseline(self) -> CellRow:
        wanted = tuple(self.study.compared_baseline().items())
        return next(cell for cell in self.cells if cell.levels == wanted)

    def cell(self, levels: Mapping[str, str]) -> CellRow | None:
        """The cell of these levels; factors that are not named stand at the baseline."""
        wanted = {**self.study.compared_baseline(), **levels}
        return next((cell for cell in self.cells if dict(cell.levels) == wanted), None)

    def count(self, state: str) -> int:
        return sum(row.state == state for row in self.rows)


def read_table(
    study: Study, record: StudyRecord, *, curves: bool = True, active: Collection[str] = ()
) -> StudyTable:
    """Read a study folder; without `curves` the step measurements are left unread (fast).

    `active`: ids of trials that are being attempted now, which no record tells for sure.
    """
    kept: dict[str, tuple[Trial, TrialRecord]] = {}
    foreign: list[TrialRecord] = []
    for folder in record.records():
        trial = study.recall(folder.trial())
        if trial is None:
            foreign.append(folder)
        else:
            kept[trial.id] = (trial, folder)
    rows = {
        key: _read(study, trial, folder, curves, is_active=key in active)
        for key, (trial, folder) in kept.items()
    }

    ended = [row.result() for row in rows.values() if row.ended]
    wanted: list[Trial] = []
    merged: list[design.Merged] = []
    confirming: list[Cell] = []
    open_ended = ""
    try:
        wanted = design.propose(study, ended)
        merged = design.merged(study, ended)
        confirming = design.confirmations(study, ended)
    except PlanError as error:
        open_ended = f"the design cannot be listed: {error}"
    for trial in wanted:
        rows.setdefault(trial.id, TrialRow(trial.id, trial.cell.levels, trial.seed, "waiting"))
    cells = _cells(study, wanted, rows)
    tuning: tuple[TuningRow, ...] = ()
    if study.candidates.levels:
        cells, tuning = _tuned_cells(study, cells, ended)
    together = tuple(study.compared_levels(cell.levels) for cell in confirming)
    own = {study.compared_levels(trial.cell.levels) for trial in wanted} - {*together}
    is_listed = bool(wanted) and not isinstance(study.design, Search)
    return StudyTable(
        study=study,
        cells=cells,
        tuning=tuning,
        results=tuple(_results(study, cells, merged)),
        foreign=tuple(_read_foreign(folder) for folder in foreign),
        chance=_chance(study),
        combinations=together,
        added=frozenset(c.levels for c in cells if is_listed and c.levels not in own),
        asked=tuple(dict.fromkeys(trial.cell.levels for trial, _ in kept.values())),
        record=record,
        trials=tuple(trial for trial, _ in kept.values()),
        open_ended=open_ended,
    )


# ---------------------------------------------------------------------------- cells and results


def _cells(
    study: Study, wanted: Sequence[Trial], rows: Mapping[str, TrialRow]
) -> tuple[CellRow, ...]:
    """Baseline first, then the design's cells in its order, then those that a search asked."""
    listed = {trial.cell.levels for trial in wanted}
    listed.add(tuple(study.baseline_levels().items()))
    listed.update(row.levels for row in rows.values())
    position = {
        factor.name: {level.name: i for i, level in enumerate(factor.levels)}
        for factor in study.factors
    }
    usual = study.baseline_levels()

    def order(levels: Levels) -> tuple[Any, ...]:
        changed = [
            (i, position[name].get(level, 0), level)
            for i, (name, level) in enumerate(levels)
            if level != usual[name]
        ]
        return (len(changed), changed)

    by_levels: dict[Levels, list[TrialRow]] = {levels: [] for levels in sorted(listed, key=order)}
    for row in rows.values():
        by_levels[row.levels].append(row)
    return tuple(
        CellRow(levels, study.change_name(dict(levels)), tuple(sorted(mine, key=lambda r: r.seed)))
        for levels, mine in by_levels.items()
    )


def _tuned_cells(
    study: Study, cells: Sequence[CellRow], ended: Sequence[Result]
) -> tuple[tuple[CellRow, ...], tuple[TuningRow, ...]]:
    """The cells that are compared, and how the nuisance settings of each were chosen."""
    by_levels = {cell.levels: cell for cell in cells}
    compared, tuning = [], []
    for levels in dict.fromkeys(study.compared_levels(cell.levels) for cell in cells):
        found = design.tune(study, study.cell(dict(levels)), ended)
        tried = [
            by_levels.get(cell.levels, CellRow(cell.levels, "", ())) for cell in found.candidates
        ]
        name = study.change_name(dict(levels))
        best = None if found.best is None else found.candidates.index(found.best)
        tuning.append(
            TuningRow(
                name,
                tuple(
                    CellRow(
                        cell.levels,
                        f"{name}, {name_settings(study, cell.levels)} (tuning)",
                        tuple(row for row in cell.trials if row.seed in study.candidates.seeds),
                    )
                    for cell in tried
                ),
                found.scores,
                best,
            )
        )
        trials = () if best is None else tried[best].trials
        compared.append(
            CellRow(
                levels,
                name if best is None else f"{name}, {name_settings(study, tried[best].levels)}",
                tuple(row for row in trials if row.seed in study.seeds),
            )
        )
    return tuple(compared), tuple(tuning)


def name_settings(study: Study, levels: Levels) -> str:
    """The nuisance settings of a cell, for people: ``lr=0.001``."""
    return ", ".join(f"{name}={level}" for name, level in study.nuisance_levels(levels).items())


def _results(
    study: Study, cells: Sequence[CellRow], merged: Iterable[design.Merged]
) -> Iterable[Result]:
    for cell in cells:
        for row in cell.trials:
            if row.ended:
                yield row.result(cell.levels)
    # Cells that are provably another one's experiment have no run of their own, but a place in
    # the design.
    own = {cell.levels: cell for cell in cells}
    for twin in merged:
        levels = study.compared_levels(twin.cell.levels)
        home = own.get(study.compared_levels(twin.home.levels))
        if home is None or levels in own:
            continue
        for row in home.trials:
            if row.ended:
                yield row.result(levels)


def _chance(study: Study) -> float | None:
    config = load(study.recipe).Config(**study.config(study.cell({}), seed=study.seeds[0]))
    try:
        metric = study.objective.metric
        return chance_of(study.recipe, config, metric=metric, root=Path(study.root))
    except (DataError, OSError):
        return None  # reports are also made on machines that do not see the data


# ---------------------------------------------------------------------------- one trial folder


def _read(
    study: Study, trial: Trial, folder: TrialRecord, curves: bool, *, is_active: bool
) -> TrialRow:
    content = folder.trial()
    ended = folder.outcome()
    outcome = judged(trial.objective, folder, ended) if ended is not None else None
    attempts = folder.attempts()
    told = (folder.result(attempts[-1]) if attempts else None) or {}
    metric = study.objective.metric
    evaluations = folder.evaluations()
    events = tuple(folder.events())
    trace = folder.trace() if curves else []
    points = [
        (float(row["epoch"]), float(row[metric]))
        for row in evaluations
        if metric in row and "epoch" in row and math.isfinite(row[metric])
    ]
    best = _best(points, maximize=study.objective.direction == "maximize")
    begun = "running" if is_active else "interrupted" if attempts else "waiting"
    state = str(outcome["outcome"]) if outcome else begun
    machine = state in (Outcome.FAILED, Outcome.LOST) and outcome is ended
    reason = str(outcome.get("reason") or "") if outcome else ""
    raw_loss = {row["step"]: row["loss"] for row in trace if "loss" in row}
    return TrialRow(
        id=trial.id,
        levels=trial.cell.levels,
        seed=trial.seed,
        state=state,
        value=outcome.get("value") if outcome and state == Outcome.COMPLETED else None,
        images=folder.num_images(metric),
        best=best[1] if best else None,
        best_epoch=best[0] if best else None,
        step=int(outcome["step"]) if outcome and "step" in outcome else max(raw_loss, default=0),
        verdict=str(outcome.get("verdict") or "") if outcome else "",
        learning=_learning(folder, told),
        flags=tuple(outcome.get("flags") or ()) if outcome else (),
        reason="" if machine or state == Outcome.COMPLETED else reason,
        events=events,
        score=Curve(tuple(x for x, _ in points), tuple(y for _, y in points)),
        loss=thin([(row["step"], row["loss"]) for row in trace if "loss" in row]),
        peaks=tuple(_finite(raw_loss.get(event.get("first_step"))) for event in events),
        config=content["config"],
        fingerprint=content.get("fingerprint"),
        cost=_cost(
            study, folder, trace, outcome, told,
            num_attempts=len(attempts), trouble=reason if machine else "",
        ),
    )  # fmt: skip


def _learning(folder: TrialRecord, told: Mapping[str, Any]) -> str:
    word = str((folder.learned() or {}).get("verdict", ""))
    was_loaded = "init_from" in (told.get("facts") or {})
    return "nothing added" if was_loaded and word == "not learning" else word


def _read_foreign(folder: TrialRecord) -> TrialRow:
    """As far as it can be read without the study's own words."""
    content = folder.trial()
    outcome = folder.outcome()
    state = str(outcome["outcome"]) if outcome else "waiting"
    return TrialRow(
        id=folder.trial_id,
        levels=tuple(content["levels"].items()),
        seed=content["seed"],
        state=state,
        value=outcome.get("value") if outcome and state == Outcome.COMPLETED else None,
        verdict=str(outcome.get("verdict") or "") if outcome else "",
    )


def _cost(
    study: Study,
    folder: TrialRecord,
    trace: Sequence[Mapping[str, Any]],
    outcome: Mapping[str, Any] | None,
    told: Mapping[str, Any],
    *,
    num_attempts: int,
    trouble: str,
) -> Cost:
    ends = folder.ends()
    workers = study.gang.workers
    wall_s, worker_s = sum(end["wall_s"] for end in ends), worker_seconds(ends, workers=workers)
    if not ends and outcome:
        wall_s, worker_s = outcome["wall_s"], outcome["wall_s"] * workers
    speeds = [row["samples_per_s"] for row in trace if _finite(row.get("samples_per_s"))]
    speed = median(speeds) if speeds else None
    peak, needed = told.get("peak_flops_per_worker"), told.get("flops_per_sample")
    return Cost(
        wall_s=wall_s,
        worker_hours=worker_s / 3600,
        attempts=num_attempts,
        crashes=sum(end.get("kind") in ("crashed", "lost") for end in ends),
        interrupted=interrupted(ends, workers=workers),
        samples_per_s=speed,
        data_wait=data_wait(trace),
        slowed=slowed_cards(folder.machine()) if trace else (),
        mfu=speed * needed / (peak * workers) if speed and needed and peak else None,
        peak_memory_gib=told.get("peak_memory_gib"),
        weighed=cost_of(study.objective.cost or "gpu_hours", outcome, workers=workers)
        if outcome
        else None,
        trouble=trouble,
    )


def _best(points: Sequence[tuple[float, float]], *, maximize: bool) -> tuple[float, float] | None:
    if not points:
        return None
    sign = 1.0 if maximize else -1.0
    return max(points, key=lambda point: sign * point[1])


def _finite(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def thin(points: Sequence[tuple[float, float]], *, most: int = CURVE_POINTS) -> Curve:
    """At most `most` points: means over bins of equal width in x; non-finite numbers left out."""
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    if len(finite) <= most:
        return Curve(tuple(x for x, _ in finite), tuple(y for _, y in finite))
    low, high = finite[0][0], finite[-1][0]
    width = (high - low) / most or 1.0
    bins: dict[int, list[tuple[float, float]]] = {}
    for x, y in finite:
        bins.setdefault(min(int((x - low) / width), most - 1), []).append((x, y))
    return Curve(
        tuple(fmean(x for x, _ in part) for part in bins.values()),
        tuple(fmean(y for _, y in part) for part in bins.values()),
    )
