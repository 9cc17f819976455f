"""What a study will cost and what it can show, before anything is paid for."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ablate import design, probe, recipes, referee, warm_start
from ablate.analysis import anytime, effects, power
from ablate.analysis.analysis import ALPHA
from ablate.analysis.results import Result, result_of, tabulate
from ablate.errors import DataError, PlanError
from ablate.records import StudyRecord, free_gib
from ablate.runner import planned
from ablate.status import Ledger
from ablate.study import LeaveOneOut, Search, Study
from ablate.trial import Cell, Levels, Trial
from ablate.wording import counted


@dataclass(frozen=True, slots=True)
class PlannedTrial:
    """One line of the plan."""

    trial_id: str
    """Empty while the trial's nuisance settings are still to be chosen."""
    name: str
    """What differs from the baseline."""
    seed: int
    state: str
    """An outcome, "begun" (goes on from its checkpoint), or "to run"."""
    steps: int | None
    """Optimizer steps; None where the data cannot be counted here."""

    @property
    def to_run(self) -> bool:
        return self.state in ("to run", "begun")


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


@dataclass(frozen=True, slots=True)
class Groups:
    """The parameter groups of an optimizer, as trials record them."""

    cells: tuple[str, ...]
    """Names of the cells that have them."""
    counts: Mapping[str, Any]
    """Weight decay, tensors and numbers of each group, and a hash of who is in which."""
    sentence: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What `launch` would do."""

    study: str
    design: str
    trials: tuple[PlannedTrial, ...]
    cells: tuple[str, ...]
    """Names of the cells in the design's order."""
    seeds: tuple[int, ...]
    workers: int
    cost: Cost | None
    cost_note: str
    """Why there is no estimate, or what it leaves out."""
    disk_gib: float | None
    """What the checkpoints of the trials to run take; None where no model was sketched."""
    detectable: float | None
    """Smallest true difference to the baseline that would be shown with probability 0.8."""
    resolution: tuple[tuple[str, str, float], ...]
    """(factor, level, smallest true difference that would be shown) of each contrast; smaller
    where a contrast averages over cells. `detectable` is that of one cell against the baseline."""
    detectable_in: str
    """Unit of `detectable`: the objective, or standard deviations where none is known yet."""
    groups: tuple[Groups, ...]
    """What the optimizers decay; empty where that was not asked for."""
    notes: tuple[str, ...]
    """Warnings of the recipe, equivalent levels, the design's alias table."""

    @property
    def to_run(self) -> tuple[PlannedTrial, ...]:
        return tuple(trial for trial in self.trials if trial.to_run)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    study: Study,
    record: StudyRecord,
    *,
    samples_per_s: float | None = None,
    concurrency: int = 1,
    sketch: bool = False,
) -> Plan:
    """The exact list of trials that launch would run, what they cost and what they can show.

    `samples_per_s` is the throughput of one gang; without it the cost comes from the folder's
    probes (:mod:`ablate.probe`), or from trials of this study that have ended. `concurrency` is
    how many gangs run at a time. `sketch` also tells what each optimizer decays and what the
    checkpoints take, which imports torch.

    Raises:
        PlanError: a configuration cannot run on the gang that is asked for, or would train a
            parameter that is in no group of its optimizer, or in two.
    """
    recipe = recipes.load(study.recipe)
    trials = planned(study, record)
    cells = design.cells(study)
    places = {cell.levels: place for place, cell in enumerate(cells)}
    num_samples, data_note = _count_samples(study, recipe, trials[0])
    notes = _check(study, recipe, trials, num_samples) + _too_few_seeds(study, len(cells))
    notes += _not_resumed(study, record, recipe, trials)
    paces = probe.paces(record)
    lines: list[PlannedTrial] = []
    remaining_s: list[tuple[float, float] | None] = []
    durations_s: list[float] = []
    ended: list[Result] = []
    for trial in trials:
        folder = record.record(trial.id)
        outcome = folder.outcome()
        config = recipe.Config(**trial.config)
        steps = None
        if num_samples is not None:
            steps = recipe.num_steps(config, workers=study.gang.workers, num_samples=num_samples)
        if outcome is not None:
            state = outcome["outcome"]
            ended.append(result_of(trial, outcome))
            durations_s.append(outcome["wall_s"])
        else:
            state = "begun" if folder.attempts() else "to run"
            remaining_s.append(_seconds(study, recipe, trial, steps, samples_per_s, paces))
        name = study.change_name(dict(trial.cell.levels))
        lines.append(PlannedTrial(trial.id, name, trial.seed, state, steps))
    listed = sorted(
        trials, key=lambda trial: places.get(study.untuned(trial.cell.levels), len(places))
    )
    names = dict.fromkeys(study.change_name(dict(trial.cell.levels)) for trial in listed)
    groups: tuple[Groups, ...] = ()
    disk_bytes: Mapping[str, int] = {}
    if sketch:
        groups, disk_bytes, unknown = _sketch(study, recipe, listed)
        notes += unknown
    unseen = 0
    num_cells = len(cells)
    for cell, seed in design.pending(study, ended):
        best = " and ".join(factor.name for factor in study.nuisance)
        name = f"{study.change_name(dict(cell.levels))}, at its best {best}"
        steps = next((line.steps for line in lines), None)
        lines.append(PlannedTrial("", name, seed, "to run", steps))
        names[name] = None
        remaining_s.append(remaining_s[0] if remaining_s else None)
    if study.candidates:
        names_tuned = ", ".join(factor.name for factor in study.nuisance)
        notes.append(
            f"{len(study.candidates)} candidates of {names_tuned} are "
            f"tried in each of {num_cells} cells on "
            f"{counted(len(study.tuning_seeds), 'tuning seed')}; the best of each is then run on "
            "the study's own seeds, and only these are compared"
        )
    if isinstance(study.design, Search):
        num_cells = len({trial.cell.levels for trial in trials})
        notes.append(
            f"{study.design.sampler} chooses up to {study.design.cells} cells while the study "
            f"runs; {num_cells} are known so far"
        )
        unseen = max(study.design.cells - num_cells, 0) * len(study.seeds)
        remaining_s += [remaining_s[0] if remaining_s else None] * unseen
    notes += design.repeats(study) + _aliases(study) + referee.advise(study)
    notes += [f"warm start: {found.sentence}" for found in warm_start.earlier_studies(study)]
    disk_gib = _disk_gib(disk_bytes, lines, unseen)
    notes += _over_disk(record.folder, disk_gib)
    cost, cost_note = _cost(study, remaining_s, durations_s, samples_per_s, paces, concurrency)
    notes += _over_budget(study, record, cost)
    sigma = _noise(ended)
    detectable, unit = _detectable(study, sigma, num_cells)
    if sigma is not None:
        notes.append(
            f"the noise between seeds is taken as {sigma:.2g} {study.objective.metric}: the upper "
            "80 % bound of what the ended trials show, since few of them often show too little"
        )
    return Plan(
        study=study.name,
        design=study.design.name,
        trials=tuple(lines),
        cells=tuple(names),
        seeds=study.seeds,
        workers=study.gang.workers,
        cost=cost,
        cost_note=" ".join(part for part in (cost_note, data_note) if part),
        disk_gib=disk_gib,
        detectable=detectable,
        resolution=_resolution(study, cells, detectable),
        detectable_in=unit,
        groups=groups,
        notes=tuple(dict.fromkeys(notes)),
    )


def _too_few_seeds(study: Study, num_cells: int) -> list[str]:
    """A seed count with which nothing can be shown, however large the effect."""
    if isinstance(study.design, Search):
        return []
    if study.sequential is None:
        n = len(study.seeds)
        if math.isfinite(power.critical(n, cells=max(num_cells, 2))):
            return []
        return [
            f"{n} seed cannot show any difference, however large: there is nothing to measure "
            "noise with. Two give intervals, three or more useful ones"
        ]
    n, questions = study.sequential.max, max(num_cells - 1, 1)
    half = anytime.anytime_half_width(
        1.0, (max(num_cells, 2) - 1) * (n - 1), n, alpha=ALPHA / 2 / questions
    )
    if math.isfinite(half):
        return []
    return [
        f"{n} seeds at most cannot show any difference after the first look: an interval that is "
        f"valid at every look is still without end for {questions} comparisons. Raise seeds.max"
    ]


_OPTIMIZER = ("lr", "wd", "beta1", "beta2", "eps", "momentum")


def _not_resumed(
    study: Study, record: StudyRecord, recipe: recipes.Recipe, trials: Sequence[Trial]
) -> list[str]:
    """Begun trials of the folder that differ from a wanted one in the optimizer's settings alone.

    Resuming them with the new settings is what one might expect, and what would silently keep the
    old ones: an optimizer's load_state_dict overwrites betas, wd and lr with those it was saved
    with.
    """
    ignored = {*recipe.NOT_IDENTITY, *_OPTIMIZER}

    def key(config: Mapping[str, Any]) -> str:
        return json.dumps({k: v for k, v in config.items() if k not in ignored}, sort_keys=True)

    new = {key(t.config): t for t in trials if not record.record(t.id).attempts()}
    mine = {trial.id for trial in trials}
    changed: set[str] = set()
    count = 0
    for folder in record.records() if new else ():
        if folder.trial_id in mine or not folder.attempts():
            continue
        content = folder.trial()["config"]
        twin = new.get(key(content))
        if twin is not None:
            changed |= {name for name in _OPTIMIZER if content.get(name) != twin.config.get(name)}
            count += 1
    if not count:
        return []
    names = ", ".join(sorted(changed))
    return [
        f"{counted(count, 'begun trial')} in the folder had another {names}; those of today start "
        "from the first step and do not resume them, since a checkpoint's optimizer brings its old "
        f"{names} along and overwrites the new"
    ]


def _check(
    study: Study, recipe: recipes.Recipe, trials: Sequence[Trial], num_samples: int | None
) -> list[str]:
    """Warnings over all cells, and what they start from, each with the cells it concerns.

    Raises:
        PlanError: every cell that cannot run, with the reason.
    """
    concerned: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    cells = {study.change_name(dict(trial.cell.levels)): trial for trial in trials}
    for name, trial in cells.items():
        config = recipe.Config(**trial.config)
        workers = study.gang.workers
        steps = None
        if num_samples is not None:
            steps = recipe.num_steps(config, workers=workers, num_samples=num_samples)
        try:
            found = recipe.check(
                config, workers=workers, gpus=study.gang.gpus_per_worker, steps=steps
            )
            _refuse_unmeasured(study.objective.metric, recipe.measures(config))
            placed = recipes.absolute(config, recipe.PATH_FIELDS, root=Path(study.root))
            start = recipe.describe_start(placed)
        except ValueError as error:
            refused.setdefault(str(error), []).append(name)
            continue
        for warning in found if start is None else [*found, start]:
            concerned.setdefault(warning, []).append(name)
    _refuse(study, refused, cells)
    return [f"{which(names, list(cells))}{warning}" for warning, names in concerned.items()]


def _sketch(
    study: Study, recipe: recipes.Recipe, trials: Sequence[Trial]
) -> tuple[tuple[Groups, ...], Mapping[str, int], list[str]]:
    """Parameter groups of all cells, each with its cells; what the checkpoints of a trial of each
    cell take, in bytes; and why some cannot be told here."""
    try:
        from ablate.training.optim import sentence
    except ImportError as error:
        return (), {}, [f"what the optimizers decay cannot be counted here: {error}"]
    found: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    sizes: dict[str, int] = {}
    unknown: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    cells = {study.change_name(dict(trial.cell.levels)): trial for trial in trials}
    for name, trial in cells.items():
        try:
            sketched = recipe.sketch(recipe.Config(**trial.config))
        except ValueError as error:
            refused.setdefault(str(error), []).append(name)
        except (ImportError, OSError, RuntimeError) as error:
            # An architecture that needs files of another machine, or that torch cannot sketch.
            unknown.setdefault(str(error), []).append(name)
        else:
            counts = sketched.groups
            found.setdefault(sentence(counts), ([], counts))[0].append(name)
            sizes[name] = sketched.disk_bytes
    _refuse(study, refused, cells)
    return (
        tuple(Groups(tuple(names), counts, text) for text, (names, counts) in found.items()),
        sizes,
        [
            f"{which(names, list(cells))}what the optimizer decays cannot be counted here: {why}"
            for why, names in unknown.items()
        ],
    )


def _refuse(study: Study, refused: Mapping[str, Sequence[str]], cells: Iterable[str]) -> None:
    if refused:
        raise PlanError(
            "\n".join(
                f"{study.path}: {which(names, list(cells))}{why}" for why, names in refused.items()
            )
        )


def which(names: Sequence[str], cells: Sequence[str]) -> str:
    """The cells that a warning concerns, as the shorter list."""
    others = [name for name in cells if name not in names]
    if not others:
        return ""
    if len(others) < len(names):
        return f"all but {'; '.join(others)}: "
    return f"{'; '.join(names)}: "


def _refuse_unmeasured(metric: str, measured: Sequence[str]) -> None:
    if metric in measured:
        return
    given = f"gives {', '.join(measured)}" if measured else "has no evaluation"
    raise ValueError(
        f"the objective {metric} is not measured: the configuration {given}. "
        "Set imagenet_val for imagenet_top1, or add the evaluation to evaluations"
    )


def _aliases(study: Study) -> list[str]:
    """What a fraction cannot tell apart."""
    found = design.fraction(study)
    if found is None:
        return []
    table = found.aliases()
    lines = []
    for effect, others in table.items():
        if " x " in effect or not others:
            continue
        named = ", ".join(
            name if abs(weight) > 1 - 1e-9 else f"{name} ({weight:+.2g})"
            for name, weight in others.items()
        )
        lines.append(f"{effect} cannot be told from {named}")
    return lines or ["main effects are clear of each other and of pairs"]


def _count_samples(study: Study, recipe: recipes.Recipe, trial: Trial) -> tuple[int | None, str]:
    try:
        config = recipe.Config(**trial.config)
        return recipe.num_samples(config, root=Path(study.root)), ""
    except (DataError, OSError) as error:
        return None, f"The data cannot be counted here: {error}"


def _seconds(
    study: Study,
    recipe: recipes.Recipe,
    trial: Trial,
    steps: int | None,
    samples_per_s: float | None,
    paces: Mapping[str, probe.Pace],
) -> tuple[float, float] | None:
    """Seconds of a whole trial, median and p90, from the given throughput or from a probe."""
    if steps is None:
        return None
    if samples_per_s:
        batch = trial.config.get("batch_size", 1) * trial.config.get("accum_freq", 1)
        seconds = float(steps * batch * study.gang.workers / samples_per_s)
        return seconds, seconds
    pace = paces.get(probe.shape_of(study, trial)) if paces else None
    if pace is None:
        return None
    config = recipe.Config(**trial.config)
    return pace.trial_s(steps=steps, evaluations=recipe.num_evaluations(config))


def _cost(
    study: Study,
    remaining_s: Sequence[tuple[float, float] | None],
    durations_s: Sequence[float],
    samples_per_s: float | None,
    paces: Mapping[str, probe.Pace],
    concurrency: int,
) -> tuple[Cost | None, str]:
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
        return None, (
            "No cost estimate yet: no trial has ended. Measure a few steps of every shape with "
            "--probe, give the throughput of one gang with --samples-per-s, or launch and ask "
            "again after the first trial."
        )
    workers = study.gang.workers
    return (
        Cost(
            worker_hours_p50=sum(p50 for p50, _ in known) * workers / 3600,
            worker_hours_p90=sum(p90 for _, p90 in known) * workers / 3600,
            makespan_hours=makespan_s([p50 for p50, _ in known], concurrency) / 3600,
            concurrency=concurrency,
            basis=basis,
        ),
        "",
    )


def makespan_s(durations_s: Sequence[float], concurrency: int) -> float:
    """Time until the last ends, each on the seat that is free first, the longest first."""
    seats = [0.0] * concurrency
    for duration_s in sorted(durations_s, reverse=True):
        heapq.heapreplace(seats, seats[0] + duration_s)
    return max(seats)


def _over_budget(study: Study, record: StudyRecord, cost: Cost | None) -> list[str]:
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


def _over_disk(folder: Path, disk_gib: float | None) -> list[str]:
    """A disk that will not hold the checkpoints."""
    if disk_gib is None:
        return []
    free = free_gib(folder)
    if disk_gib <= free:
        return []
    return [
        f"{free:.1f} GiB are free for {folder}, and the checkpoints of the trials to run take up "
        f"to {disk_gib:.1f} GiB: trials wait while the disk is full. Make room, or give --runs on "
        "another disk"
    ]


def _detectable(study: Study, sigma: float | None, num_cells: int) -> tuple[float | None, str]:
    """The minimum detectable effect of a contrast with the baseline, pooled over cells."""
    n = study.sequential.min if study.sequential else len(study.seeds)
    if isinstance(study.design, Search):
        num_cells = study.design.cells
    if n < 2 or num_cells < 2:
        return None, "one seed cannot show any difference: there is nothing to measure noise with"
    value = power.mde(n, sigma=sigma or 1.0, contrasts=num_cells - 1, cells=num_cells)
    if not math.isfinite(value):
        return None, "these seeds cannot show any difference"
    return value, study.objective.metric if sigma else "standard deviations of one run"


def _resolution(
    study: Study, cells: Sequence[Cell], detectable: float | None
) -> tuple[tuple[str, str, float], ...]:
    """`detectable` for each contrast, by the share of the noise that its weights leave."""
    if detectable is None or isinstance(study.design, (Search, LeaveOneOut)):
        return ()
    names = {factor.name for factor in study.compared}
    table = tabulate(
        Result(tuple(pair for pair in cell.levels if pair[0] in names), 0, "completed", 0.0)
        for cell in cells
    )
    base = study.baseline_levels()
    reference = tuple(base[factor] for factor in table.factors)
    estimand = "auto" if design.fraction(study) is None else "additive"
    found = []
    for factor in table.factors:
        for level in table.levels(factor):
            if level == base[factor]:
                continue
            weights = effects.compare(table, reference, factor, level, estimand=estimand).weights
            size = float(weights @ weights)
            if size > 0:  # one cell against another: 2
                found.append((factor, level, detectable * math.sqrt(size / 2)))
    return tuple(found)


def _noise(ended: Sequence[Result]) -> float | None:
    """Upper 80 % bound of the standard deviation between seeds, pooled over the ended cells.

    None below two degrees of freedom.
    """
    values: dict[Levels, list[float]] = {}
    for result in ended:
        if result.value is not None:
            values.setdefault(result.levels, []).append(result.value)
    repeated = [group for group in values.values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    if freedom < 2:
        return None
    squares = sum((len(group) - 1) * float(np.var(group, ddof=1)) for group in repeated)
    return power.sigma_upper(math.sqrt(squares / freedom), freedom) or None


def _disk_gib(
    disk_bytes: Mapping[str, int], lines: Sequence[PlannedTrial], unseen: int
) -> float | None:
    """Of the trials to run among `lines`, and of `unseen` ones whose cells are not known yet."""
    if not disk_bytes:
        return None
    largest = max(disk_bytes.values())
    known = sum(disk_bytes.get(line.name, largest) for line in lines if line.to_run)
    return (known + unseen * largest) / 2**30
