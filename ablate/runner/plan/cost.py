"""What trials take: seconds from a throughput or a probe, worker-hours, disk, and the budget."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ablate.records.folder import StudyRecord
from ablate.runner.budget import Ledger
from ablate.runner.plan import probe
from ablate.study import Study
from ablate.trial.identity import Trial
from ablate.trial.recipe import Outline, find_ability


@dataclass(frozen=True, slots=True)
class Cost:
    """Worker-hours (accelerator-hours on accelerators) and time, of the trials still to run."""

    worker_hours_p50: float
    worker_hours_p90: float
    makespan_hours: float
    """With `concurrency` gangs at a time."""
    concurrency: int
    basis: str
    """Where the estimate comes from."""
    price_p50: float | None = None
    """In the money of budget.price_per_gpu_hour."""
    price_p90: float | None = None


def seconds_of(
    study: Study,
    trial: Trial,
    outline: Outline,
    samples_per_s: float | None,
    paces: Mapping[str, probe.Pace],
) -> tuple[float, float] | None:
    """Seconds of a whole trial, median and p90, from the given throughput or from a probe."""
    if outline.steps is None:
        return None
    if samples_per_s:
        if outline.samples is None:
            return None
        seconds = outline.steps * outline.samples / samples_per_s
        return seconds, seconds
    pace = paces.get(probe.shape_of(study, trial)) if paces else None
    if pace is None:
        return None
    return pace.trial_s(steps=outline.steps, evaluations=outline.evaluations)


def cost_of(
    study: Study,
    remaining_s: Sequence[tuple[float, float] | None],
    durations_s: Sequence[float],
    samples_per_s: float | None,
    paces: Mapping[str, probe.Pace],
    concurrency: int,
) -> Cost | None:
    """What the trials still to run take; None where nothing tells it yet."""
    known = [seconds for seconds in remaining_s if seconds is not None]
    if len(known) == len(remaining_s) and (samples_per_s or paces):
        if samples_per_s:
            basis = f"{samples_per_s:g} samples/s a gang, as given; evaluations not counted"
        else:
            basis = f"a probe of each of {len(paces)} shapes of trial, evaluations counted"
    elif durations_s:
        typical = median(durations_s), float(np.quantile(durations_s, 0.9))
        known = [typical] * len(remaining_s)
        basis = f"{len(durations_s)} ended trials of this study"
    else:
        return None
    workers = study.gang.workers
    p50, p90 = (sum(seconds[i] for seconds in known) * workers / 3600 for i in (0, 1))
    return Cost(
        worker_hours_p50=p50,
        worker_hours_p90=p90,
        makespan_hours=makespan_s([usual for usual, _ in known], concurrency) / 3600,
        concurrency=concurrency,
        basis=basis,
        price_p50=study.price(p50),
        price_p90=study.price(p90),
    )


def why_unknown(study: Study, outlines: Collection[Outline]) -> str:
    """Why there is no `cost_of`, and how it comes to be known, as far as each way is open."""
    ways = []
    if any(found.steps for found in outlines) and find_ability(study.recipe, "shorten"):
        ways.append("measure a few steps of every shape with --probe")
    if any(found.steps and found.samples for found in outlines):
        ways.append("give the throughput of one gang with --samples-per-s")
    last = "launch and ask again after the first trial"
    text = ", ".join([*ways, f"or {last}" if ways else last])
    return f"No cost estimate yet: no trial has ended. {text[0].upper()}{text[1:]}."


def makespan_s(durations_s: Sequence[float], concurrency: int) -> float:
    """Time until the last ends, each on the seat that is free first, the longest first."""
    seats = [0.0] * concurrency
    for duration_s in sorted(durations_s, reverse=True):
        heapq.heapreplace(seats, seats[0] + duration_s)
    return max(seats)


def over_budget(study: Study, record: StudyRecord, cost: Cost | None) -> list[str]:
    """A budget that will not hold what is left to run."""
    limit = study.budget.gpu_hours
    if limit is None or cost is None:
        return []
    ledger = Ledger()
    for folder in record.records():
        ledger.spend(folder.ends(), workers=study.gang.workers)
    left = limit - ledger.spent_s / 3600
    if cost.worker_hours_p90 <= left:
        return []
    return [
        f"budget.gpu_hours leaves {max(left, 0.0):.3g} h, and what is left to run takes about "
        f"{cost.worker_hours_p50:.3g} h (p90 {cost.worker_hours_p90:.3g} h): blocks of seeds that "
        "may not fit will not be begun"
    ]


def over_disk(folder: Path, disk_gib: float | None, *, free_gib: float) -> list[str]:
    """A disk that will not hold the checkpoints."""
    if disk_gib is None or disk_gib <= free_gib:
        return []
    return [
        f"{free_gib:.1f} GiB are free for {folder}, and the checkpoints of the trials to run take "
        f"up to {disk_gib:.1f} GiB: trials wait while the disk is full. Make room, or give --runs "
        "on another disk"
    ]
