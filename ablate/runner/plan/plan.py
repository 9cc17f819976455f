"""What a study will cost and what it can show, before anything is paid for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ablate.analysis.results import Result
from ablate.records.files import free_gib
from ablate.records.folder import StudyRecord
from ablate.runner.agenda import planned
from ablate.runner.plan import probe
from ablate.runner.plan.cost import (
    Cost,
    cost_of,
    over_budget,
    over_disk,
    seconds_of,
    why_unknown,
)
from ablate.runner.plan.outlines import (
    Remark,
    not_resumed,
    outline_cells,
    remarks_of,
    warnings_of,
)
from ablate.runner.plan.resolution import (
    detectable_of,
    noise_of,
    resolution_of,
    too_few_seeds,
)
from ablate.runner.tenant import check_tenant
from ablate.search import referee, warm_start
from ablate.study import Search, Study, design, sweep
from ablate.study.data import find_missing
from ablate.study.results import result_of
from ablate.trial.identity import Trial
from ablate.trial.recipe import Outline
from ablate.words import counted, html_table, name_seeds


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
class Plan:
    """What `launch` would do."""

    study: str
    design: str
    trials: tuple[PlannedTrial, ...]
    unseen: int
    """Trials that may follow in cells that are not known yet."""
    cells: tuple[str, ...]
    """Names of the cells in the design's order."""
    seeds: tuple[int, ...]
    workers: int
    cost: Cost | None
    cost_note: str
    """Why there is no estimate, or what it leaves out."""
    disk_gib: float | None
    """What the checkpoints of the trials to run take; None where no model was sketched."""
    shared_gib: float | None
    """What the loading processes of one worker hold in /dev/shm at most; None: not known."""
    detectable: float | None
    """Smallest true difference to the baseline that would be shown with probability 0.8."""
    resolution: tuple[tuple[str, str, float], ...]
    """(factor, level, smallest true difference that would be shown) of each contrast; smaller
    where a contrast averages over cells. `detectable` is that of one cell against the baseline."""
    detectable_in: str
    """Unit of `detectable`: the objective, or standard deviations where none is known yet."""
    groups: tuple[Remark, ...]
    """What the recipe adds, such as what the optimizers decay."""
    notes: tuple[str, ...]
    """Warnings of the recipe, equivalent levels, the design's alias table."""

    @property
    def to_run(self) -> tuple[PlannedTrial, ...]:
        return tuple(trial for trial in self.trials if trial.to_run)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _repr_html_(self) -> str:
        cost = f"{self.cost.worker_hours_p50:.3g} worker-hours" if self.cost else self.cost_note
        shows = f"differences from {self.detectable:.2g} {self.detectable_in}"
        rows = [
            ("to run", f"{len(self.to_run)} of {counted(len(self.trials), 'trial')}"),
            ("cells", ", ".join(self.cells)),
            ("seeds", ", ".join(map(str, self.seeds))),
            ("cost", cost),
            ("shows", shows if self.detectable is not None else "not known"),
            *(("note", note) for note in self.notes),
        ]
        return html_table(rows)


def plan(
    study: Study,
    record: StudyRecord,
    *,
    samples_per_s: float | None = None,
    concurrency: int = 1,
    deep: bool = False,
) -> Plan:
    """The exact list of trials that launch would run, what they cost and what they can show.

    `samples_per_s` is the throughput of one gang; without it the cost comes from the folder's
    probes (:mod:`ablate.runner.plan.probe`), or from trials of this study that have ended.
    `concurrency` is how many gangs run at a time. `deep` also tells what each optimizer decays and
    what the checkpoints take, which may import torch.

    Raises:
        PlanError: a configuration cannot run on the gang that is asked for, or would train a
            parameter that is in no group of its optimizer, or in two.
        RecordError: the folder is another study's.
    """
    check_tenant(study, record)
    trials = planned(study, record)
    cells = design.cells(study)
    outlines = outline_cells(study, trials, deep=deep)
    notes = [f"{each}: a launch here would refuse" for each in find_missing(study)]
    notes += warnings_of(outlines) + too_few_seeds(study, len(cells))
    notes += not_resumed(study, record, trials)
    paces = probe.paces(record)
    listed = _list(study, record, trials, outlines, samples_per_s, paces)
    names = _in_order(study, trials, [cell.levels for cell in cells])
    searched = {trial.cell.levels for trial in trials}
    num_cells = len(searched if isinstance(study.design, Search) else cells)
    notes += _add_unlisted(study, listed, names, num_cells)
    notes += design.repeats(study) + _aliases(study) + referee.advise(study) + _taught(study)
    disk_gib = _disk_gib(outlines, listed)
    notes += over_disk(record.folder, disk_gib, free_gib=free_gib(record.folder))
    cost = cost_of(study, listed.remaining_s, listed.durations_s, samples_per_s, paces, concurrency)
    notes += over_budget(study, record, cost)
    sigma = noise_of(listed.ended)
    detectable, unit = detectable_of(study, sigma, num_cells)
    notes += _noise_note(study, sigma)
    return Plan(
        study=study.name,
        design=study.design.name,
        trials=tuple(listed.lines),
        unseen=listed.unseen,
        cells=tuple(names),
        seeds=study.seeds,
        workers=study.gang.workers,
        cost=cost,
        cost_note=_cost_note(study, outlines, cost),
        disk_gib=disk_gib,
        shared_gib=_shared_gib(outlines),
        detectable=detectable,
        resolution=resolution_of(study, cells, detectable),
        detectable_in=unit,
        groups=remarks_of({name: outlines[name] for name in names if name in outlines}),
        notes=tuple(dict.fromkeys(notes)),
    )


@dataclass(slots=True)
class _Listed:
    """The trials of a plan, as they are gathered."""

    lines: list[PlannedTrial] = field(default_factory=list)
    remaining_s: list[tuple[float, float] | None] = field(default_factory=list)
    """Median and p90 of each trial that is still to run; None where they are not known."""
    durations_s: list[float] = field(default_factory=list)
    """Of the trials that have ended."""
    ended: list[Result] = field(default_factory=list)
    unseen: int = 0
    """Trials that may follow in cells that are not known yet."""

    def add_unseen(self, count: int) -> None:
        """Trials like those that are known."""
        self.unseen += count
        self.remaining_s += [self.remaining_s[0] if self.remaining_s else None] * count


def _list(
    study: Study,
    record: StudyRecord,
    trials: Sequence[Trial],
    outlines: Mapping[str, Outline],
    samples_per_s: float | None,
    paces: Mapping[str, probe.Pace],
) -> _Listed:
    """The trials that are wanted now, each with its state and what is left of it."""
    listed = _Listed()
    for trial in trials:
        folder = record.record(trial.id)
        outcome = folder.outcome()
        name = study.change_name(dict(trial.cell.levels))
        outline = outlines[name]
        if outcome is not None:
            state = outcome["outcome"]
            listed.ended.append(result_of(trial, folder, outcome))
            listed.durations_s.append(outcome["wall_s"])
        else:
            state = "begun" if folder.attempts() else "to run"
            listed.remaining_s.append(seconds_of(study, trial, outline, samples_per_s, paces))
        listed.lines.append(PlannedTrial(trial.id, name, trial.seed, state, outline.steps))
    return listed


def _in_order(study: Study, trials: Sequence[Trial], cells: Sequence[Any]) -> dict[str, None]:
    """Names of the cells in the design's order."""
    places = {levels: place for place, levels in enumerate(cells)}
    ordered = sorted(
        trials, key=lambda trial: places.get(study.untuned(trial.cell.levels), len(places))
    )
    return dict.fromkeys(study.change_name(dict(trial.cell.levels)) for trial in ordered)


def _add_unlisted(
    study: Study, listed: _Listed, names: dict[str, None], num_cells: int
) -> list[str]:
    """Count the trials that only results can name; what is said of them."""
    notes = _add_chosen_later(study, listed, names, num_cells)
    if isinstance(study.design, Search):
        notes += _add_searched(study, study.design, listed, num_cells)
    return notes + _add_confirming(study, listed)


def _add_chosen_later(
    study: Study, listed: _Listed, names: dict[str, None], num_cells: int
) -> list[str]:
    """Trials whose nuisance settings are still to be chosen; how that is done."""
    for cell, seed in design.pending(study, listed.ended):
        best = " and ".join(factor.name for factor in study.nuisance)
        name = f"{study.change_name(dict(cell.levels))}, at its best {best}"
        steps = next((line.steps for line in listed.lines), None)
        listed.lines.append(PlannedTrial("", name, seed, "to run", steps))
        names[name] = None
        listed.remaining_s.append(listed.remaining_s[0] if listed.remaining_s else None)
    if not study.candidates.levels:
        return []
    names_tuned = ", ".join(factor.name for factor in study.nuisance)
    return [
        f"{len(study.candidates.levels)} candidates of {names_tuned} are "
        f"tried in each of {num_cells} cells on "
        f"{counted(len(study.candidates.seeds), 'tuning seed')}; the best of each is then run on "
        "the study's own seeds, and only these are compared"
    ]


def _add_searched(study: Study, search: Search, listed: _Listed, num_cells: int) -> list[str]:
    """Cells that the sampler has still to choose."""
    asked = num_cells + sweep.num_repeats(study, (line.seed for line in listed.lines))
    listed.add_unseen(max(search.cells - asked, 0) * len(study.seeds))
    return [
        f"{search.sampler} chooses up to {search.cells} cells while the study "
        f"runs; {num_cells} are known so far"
    ]


def _add_confirming(study: Study, listed: _Listed) -> list[str]:
    """Trials that confirm the study at its end."""
    last = _confirming(study, listed.lines)
    if not last:
        return []
    listed.add_unseen(last)
    return [
        f"confirm: at the end, {_what_confirms(study)}: up to {counted(last, 'trial')}, "
        "counted here"
    ]


def _noise_note(study: Study, sigma: float | None) -> list[str]:
    if sigma is None:
        return []
    return [
        f"the noise between seeds is taken as {sigma:.2g} {study.objective.metric}: the upper "
        "80 % bound of what the ended trials show, since few of them often show too little"
    ]


def _taught(study: Study) -> list[str]:
    """What earlier studies bring to this one."""
    return [f"warm start: {found.sentence}" for found in warm_start.earlier_studies(study)]


def _cost_note(study: Study, outlines: Mapping[str, Outline], cost: Cost | None) -> str:
    no_steps = next((found.no_steps for found in outlines.values() if found.no_steps), "")
    unknown = "" if cost else why_unknown(study, outlines.values())
    uncounted = f"Steps cannot be counted here: {no_steps}" if no_steps else ""
    return " ".join(part for part in (unknown, uncounted) if part)


def _what_confirms(study: Study) -> str:
    if isinstance(study.design, Search):
        return (
            f"the best {sweep.CONFIRMED} settings by the model and the baseline are run on "
            f"{name_seeds(study.fresh_seeds)}"
        )
    return "the changes that look better alone are run together"


def _confirming(study: Study, lines: Sequence[PlannedTrial]) -> int:
    """Trials that may follow to confirm the study: which cell is known when all others ended."""
    if not study.confirm:
        return 0
    if isinstance(study.design, Search):
        known = sum(line.seed in study.fresh_seeds for line in lines)
        return max((sweep.CONFIRMED + 1) * len(study.fresh_seeds) - known, 0)
    if not any(line.to_run for line in lines):
        return 0
    tried = len(study.candidates.levels) * len(study.candidates.seeds)
    return tried + (len(study.seeds) if study.sequential is None else study.sequential.max)


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


def _shared_gib(outlines: Mapping[str, Outline]) -> float | None:
    known = [o.shared_bytes for o in outlines.values() if o.shared_bytes is not None]
    return max(known) / 2**30 if known else None


def _disk_gib(outlines: Mapping[str, Outline], listed: _Listed) -> float | None:
    """What the checkpoints of the trials to run take, of known cells and of unseen ones."""
    disk_bytes = {
        name: found.checkpoint_bytes
        for name, found in outlines.items()
        if found.checkpoint_bytes is not None
    }
    if not disk_bytes:
        return None
    largest = max(disk_bytes.values())
    known = sum(disk_bytes.get(line.name, largest) for line in listed.lines if line.to_run)
    return (known + listed.unseen * largest) / 2**30
