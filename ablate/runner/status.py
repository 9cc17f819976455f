"""What a study looks like right now, read from its folder alone.

The controller shows the same picture while it runs, `ablate status` shows it from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ablate.records.folder import StudyRecord, TrialRecord
from ablate.runner.budget import Ledger
from ablate.runner.hold import read_controller
from ablate.search import referee
from ablate.study import Search, Study, sweep
from ablate.study.results import result_of
from ablate.trial.identity import Outcome, Trial
from ablate.trial.speed import describe_machines
from ablate.words import counted, html_table


@dataclass(frozen=True, slots=True)
class Running:
    """A trial that is being attempted, with its latest numbers."""

    trial_id: str
    name: str
    """What differs from the baseline."""
    seed: int
    attempt: int
    phase: str
    """starting, training, evaluating, ..., as the worker says."""
    step: int
    steps_total: int
    epoch: float
    samples_per_s: float | None
    loss: float | None
    objective: float | None
    """The objective at the last evaluation."""
    num_events: int
    """Marker events so far."""
    eta_s: float | None
    data_wait: float | None = None
    """Share of its steps' time, so far, that waited for data."""
    slowed: tuple[str, ...] = ()
    """Its accelerators that have lowered their clocks, with why."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A trial that ended without telling anything about its setting."""

    trial_id: str
    name: str
    seed: int
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """Totals and the running trials of one study."""

    name: str
    metric: str
    controller: str
    """running, stopping, or absent."""
    num_trials: int
    """Trials that the study wants, as far as is known."""
    outcomes: Mapping[str, int]
    """Ended trials by outcome."""
    waiting: int
    """Neither ended nor running."""
    running: tuple[Running, ...]
    worker_hours: float
    """Worker-hours (accelerator-hours on accelerators) spent in all attempts."""
    eta_s: float | None
    """Estimated time until the last trial ends; None before the first has ended."""
    unit: str = ""
    """Of the metric: a fraction is written in per cent."""
    price: float | None = None
    """What the attempts have cost, by budget.price_per_gpu_hour; None without one."""
    disruptions: Mapping[str, float] = field(default_factory=dict)
    """What machines that were taken away, or broke, cost: attempts preempted and lost, steps
    trained again, and the worker-seconds of those (again_worker_s)."""
    unanswered: tuple[Unanswered, ...] = ()
    """Trials that failed, were lost or do not fit the machine, with the reason."""
    notes: tuple[str, ...] = ()
    """Troubles that do not stop the study (tracking is away, nothing can be placed now)."""
    pruning: tuple[str, ...] = ()
    """How the rungs of a search stand, a line each."""
    search: tuple[str, ...] = ()
    """How a search stands, a line each."""
    interrupted: int = 0
    """Of those that wait: begun, and to go on from their checkpoint."""
    stuck: str = ""
    """Why nothing can go on now, as the controller sees it."""
    over_budget: bool = False
    """Nothing more is started, as the controller sees it."""
    preempted: int = 0
    """Attempts of this launch that somebody took the machine from."""

    @property
    def num_ended(self) -> int:
        return sum(self.outcomes.values())

    @property
    def machines(self) -> str:
        """Which running trials wait for data, or have slowed cards; empty where none does."""
        return describe_machines({f"{row.name}, seed {row.seed}": row for row in self.running})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "num_ended": self.num_ended}

    def _repr_html_(self) -> str:
        rows = [
            ("ended", f"{self.num_ended} of {counted(self.num_trials, 'trial')}"),
            *self.outcomes.items(),
            ("running", len(self.running)),
            ("waiting", self.waiting),
            ("spent", f"{self.worker_hours:.2g} worker-hours"),
            *((trial.name, trial.reason) for trial in self.unanswered),
        ]
        return html_table(rows)


def summarise(study: Study, record: StudyRecord, trials: Sequence[Trial]) -> StudyStatus:
    """Read the folder of `study` into a picture of it; works from any process."""
    note = read_controller(record) or {"state": "absent", "active": {}, "notes": []}
    ledger = Ledger()
    running = []
    unlearned: list[str] = []
    interrupted = 0
    for trial in trials:
        folder = record.record(trial.id)
        outcome = folder.outcome()
        if outcome is not None and outcome["outcome"] == Outcome.COMPLETED:
            unlearned += _not_learning(study, trial, folder)
        ledger.spend(folder.ends(), workers=study.gang.workers)
        if outcome is not None:
            ledger.count(trial, outcome)
        elif trial.id in note["active"]:
            running.append((trial, note["active"][trial.id]))
        else:
            interrupted += bool(folder.attempts())
    return picture(
        study,
        record,
        ledger,
        running=running,
        num_trials=len(trials),
        controller=note["state"],
        notes=[*note["notes"], *unlearned],
        interrupted=interrupted,
        pruning=referee.describe(study, record, trials),
        search=_search(study, record, trials),
    )


def _not_learning(study: Study, trial: Trial, folder: TrialRecord) -> list[str]:
    """A note, when the weights and features of a completed trial say that it did not learn."""
    learned = folder.learned()
    if learned is None or learned["verdict"] not in ("not learning", "collapsed"):
        return []
    why = [*learned.get("flags", ()), *learned["reasons"]][0]
    name = study.change_name(dict(trial.cell.levels))
    return [
        f"{name} · seed {trial.seed}: {learned['verdict']} ({why}); ablate inspect {folder.folder}"
    ]


def _search(study: Study, record: StudyRecord, trials: Sequence[Trial]) -> tuple[str, ...]:
    if not isinstance(study.design, Search):
        return ()
    folders = [(trial, record.record(trial.id)) for trial in trials]
    results = [
        result_of(trial, folder, outcome)
        for trial, folder in folders
        if (outcome := folder.outcome()) is not None
    ]
    asked = len({trial.cell.levels for trial in trials})
    asked += sweep.num_repeats(study, (trial.seed for trial in trials))
    return sweep.progress(study, results, asked=asked)


def picture(
    study: Study,
    record: StudyRecord,
    ledger: Ledger,
    *,
    running: Sequence[tuple[Trial, int]],
    num_trials: int,
    controller: str,
    notes: Sequence[str],
    pruning: Sequence[str] = (),
    search: Sequence[str] = (),
    interrupted: int = 0,
) -> StudyStatus:
    """The status of a study whose totals are known; reads only the running trials' heartbeats.

    `running` holds (trial, attempt's number) of those that the cluster has.
    """
    rows = tuple(
        _running(study, trial, record.record(trial.id), attempt) for trial, attempt in running
    )
    waiting = num_trials - sum(ledger.outcomes.values()) - len(rows)
    declared = study.describe(study.objective.metric)
    return StudyStatus(
        name=study.name,
        metric=study.objective.metric,
        unit=declared.unit if declared else "",
        controller=controller,
        num_trials=num_trials,
        outcomes={name: count for name, count in ledger.outcomes.items() if count},
        waiting=waiting,
        running=rows,
        worker_hours=ledger.spent_s / 3600,
        price=study.price(ledger.spent_s / 3600),
        disruptions=dict(ledger.interrupted),
        eta_s=_eta_s(rows, waiting, ledger.durations_s, max(len(rows), 1)),
        unanswered=tuple(
            Unanswered(
                trial.id, study.change_name(dict(trial.cell.levels)), trial.seed, outcome, reason
            )
            for trial, outcome, reason in ledger.unanswered
        ),
        notes=tuple(notes),
        pruning=tuple(pruning),
        search=tuple(search),
        interrupted=interrupted,
    )


def _running(study: Study, trial: Trial, folder: TrialRecord, attempt: int) -> Running:
    beat = folder.heartbeat(attempt) or {}
    step, total = int(beat.get("step") or 0), int(beat.get("steps_total") or 0)
    return Running(
        trial_id=trial.id,
        name=study.change_name(dict(trial.cell.levels)),
        seed=trial.seed,
        attempt=attempt,
        phase=str(beat.get("phase", "starting")),
        step=step,
        steps_total=total,
        epoch=float(beat.get("epoch", 0.0)),
        samples_per_s=beat.get("samples_per_s"),
        loss=beat.get("loss"),
        objective=(beat.get("final") or {}).get(study.objective.metric),
        num_events=len(folder.events()),
        eta_s=_time_left_s(folder, attempt, beat, step=step, steps_total=total),
        data_wait=beat.get("data_wait"),
        slowed=tuple(beat.get("slowed", ())),
    )


def _time_left_s(
    folder: TrialRecord, attempt: int, beat: Mapping[str, Any], *, step: int, steps_total: int
) -> float | None:
    """What the pace of this attempt so far, evaluations included, leaves to be done."""
    first = folder.first_row(attempt)
    if first is None or "time" not in beat or step <= first["step"]:
        return None
    pace_s = (beat["time"] - first["time"]) / (step - first["step"])
    return float(max(pace_s * (steps_total - step), 0.0))


def _eta_s(
    running: Sequence[Running], waiting: int, durations_s: Sequence[float], concurrency: int
) -> float | None:
    """Time until the last trial ends: what is left of the running ones, then rounds of waiting."""
    left = [trial.eta_s for trial in running if trial.eta_s is not None]
    if durations_s:
        typical_s = median(durations_s)
    elif left and running[0].steps_total and running[0].step:
        first = running[0]
        typical_s = (first.eta_s or 0.0) / max(1 - first.step / first.steps_total, 1e-3)
    else:
        return None
    unknown = len(running) - len(left)
    work_s = sum(left) + (unknown + waiting) * typical_s
    return max([work_s / concurrency, *left])
