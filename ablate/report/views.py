"""Cells, trials, cost and tuning as rows of a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median

from ablate.report.pareto import weigh
from ablate.report.scale import NONE, Scale, plain_number
from ablate.study import Search
from ablate.study.table import UNENDED, StudyTable, TrialRow, name_settings
from ablate.trial.identity import Outcome
from ablate.trial.speed import describe_machines
from ablate.words import counted, describe_interruptions, money, percent

STATES = (*(str(outcome) for outcome in Outcome), *UNENDED)
"""Of a trial, ended ones first."""


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
    """A row per cell; those of a search best first, for its sampler knows no other order."""
    cells = list(table.cells)
    if isinstance(table.study.design, Search):
        goal = table.study.objective
        cells.sort(key=lambda cell: _rank(cell.score(table.chance), goal.sign))
    return tuple(
        CellView(
            cell.name,
            scale.value(cell.mean),
            scale.delta(cell.spread).lstrip("+") if cell.spread is not None else NONE,
            scale.value(cell.score(table.chance)),
            ", ".join(f"{cell.count(s)} {s}" for s in STATES if cell.count(s)),
            tuple(
                (row.seed, scale.value(row.value) if row.value is not None else row.state)
                for row in cell.trials
            ),
        )
        for cell in cells
    )


def _rank(score: float | None, sign: float) -> float:
    return math.inf if score is None else -sign * score


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
    """A row per trial."""
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
    data_wait: str
    mfu: str
    memory: str
    attempts: int
    crashes: int


@dataclass(frozen=True, slots=True)
class CostView:
    unit: str
    """accelerator-hours, or worker-hours on CPUs."""
    total: str
    price: str
    """What the whole study has cost, in a sentence; empty where the study names no price."""
    lost: str
    attempts: int
    crashes: int
    interruptions: str
    """What machines that were taken away, or broke, cost, in a sentence; empty where none was."""
    machines: str
    """Which trials waited for data, or had slowed cards; empty where none had."""
    rows: tuple[CostRow, ...]
    trade: str
    """Label of what the score is weighed against; empty where there is nothing to trade."""
    more: str
    """What the trials that would tell more would take, in a sentence; empty where not known."""
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


def cost_view(table: StudyTable, folder: str, scale: Scale, *, more: int = 0) -> CostView:
    """What the study took, on which machines' account; differs between equal studies.

    `more`: trials that would be run to know more.
    """
    trade = weigh(table)
    everything = [row.cost for row in table.rows]
    attempted = {
        f"{cell.name}, seed {row.seed}": row.cost
        for cell in table.everything
        for row in cell.trials
        if row.cost.attempts
    }
    unscored = [row.cost for row in table.rows if row.ended and not row.scored]
    study = table.study
    spent = sum(cost.worker_hours for cost in everything)
    price = study.price(spent)
    return CostView(
        unit="accelerator-hours" if study.gang.gpus_per_worker else "worker-hours",
        total=plain_number(spent),
        price="" if price is None else f"By budget.price_per_gpu_hour that is {money(price)}.",
        lost=plain_number(sum(cost.worker_hours for cost in unscored)),
        attempts=sum(cost.attempts for cost in everything),
        crashes=sum(cost.crashes for cost in everything),
        interruptions=describe_interruptions(_sum(cost.interrupted for cost in everything)),
        machines=describe_machines(attempted),
        rows=tuple(_cost_rows(table)),
        trade=trade.label if trade else "",
        more=_more(table, more),
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
        path=study.source.path,
    )


def _cost_rows(table: StudyTable) -> list[CostRow]:
    """Of every cell that was attempted."""
    rows = []
    for cell in table.everything:
        costs = [row.cost for row in cell.trials if row.cost.attempts]
        if not costs:
            continue
        speeds = [cost.samples_per_s for cost in costs if cost.samples_per_s]
        waits = [cost.data_wait for cost in costs if cost.data_wait is not None]
        used = [cost.mfu for cost in costs if cost.mfu is not None]
        memory = [cost.peak_memory_gib for cost in costs if cost.peak_memory_gib]
        rows.append(
            CostRow(
                cell.name,
                plain_number(sum(cost.worker_hours for cost in costs)),
                f"{median(speeds):,.0f}" if speeds else NONE,
                percent(median(waits)) if waits else NONE,
                percent(median(used)) if used else "",
                plain_number(max(memory)) if memory else NONE,
                sum(cost.attempts for cost in costs),
                sum(cost.crashes for cost in costs),
            )
        )
    return rows


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0) + amount
    return total


def _more(table: StudyTable, trials: int) -> str:
    took = [row.cost.worker_hours for row in table.rows if row.value is not None]
    if not trials or not took:
        return ""
    unit = "accelerator-hours" if table.study.gang.gpus_per_worker else "worker-hours"
    return (
        f"To know more ({counted(trials, 'more trial')}, see the answer) takes about "
        f"{plain_number(trials * fmean(took), 2)} {unit}."
    )


@dataclass(frozen=True, slots=True)
class TuningView:
    """The choice of the nuisance settings of one compared cell, ready to print."""

    name: str
    candidates: tuple[tuple[str, str, bool], ...]
    """(settings, score or what is missing, whether it was chosen)."""
    chosen: str


def tuning_views(table: StudyTable, scale: Scale) -> tuple[TuningView, ...]:
    """A row per compared cell, where nuisance settings were tuned."""
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
