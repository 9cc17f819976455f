"""One rank of one attempt of a trial, as a recipe meets it.

A recipe says what it measured; the session records it, lets the markers judge it, shows signs of
life, and knows when to leave. On ranks other than 0 what is said goes nowhere, so a recipe says
the same on all of them.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from ablate.analysis.results import is_score
from ablate.markers import Context, Event, Monitor, Thresholds
from ablate.records.attempt import AttemptWriter
from ablate.records.files import write_json
from ablate.records.folder import TrialRecord
from ablate.records.scribe import Scribe
from ablate.records.stores import CHECKPOINTS
from ablate.trial.machine import Machine
from ablate.trial.pulse import Pulse
from ablate.trial.speed import DataWait, slowed_cards

log = logging.getLogger("ablate")

HEARTBEAT_S = 1.0
"""At least so long between two heartbeats of steps,"""
_SETTLED_S, _SETTLED_HEARTBEAT_S = 60.0, 5.0
"""and so long once an attempt is this old: each is three operations of a shared disk's metadata."""

Status = Literal["completed", "diverged", "stopped", "failed", "infeasible"]
Leave = Literal["", "stopped", "diverged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why and where a rank ended; the same on every rank."""

    status: Status
    reason: str
    step: int = 0
    """Optimizer steps completed."""
    steps_total: int | None = None
    final: Mapping[str, float] = field(default_factory=dict)
    """Measurements of the last evaluation."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Measurements of the best evaluation, with its step."""


class Session:
    """What a recipe's ``run`` is given; this one, of a rank other than 0, records nothing."""

    def __init__(
        self,
        trial: Mapping[str, Any],
        folder: Path,
        *,
        config: Any,
        recorded: Mapping[str, Any],
        may_differ: Collection[str] = (),
        rank: int = 0,
        world_size: int = 1,
        attempt: int | None = None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.trial = trial
        """The content of trial.json."""
        self.folder = folder
        """Folder of the trial."""
        self.config = config
        """The recipe's Config, paths absolute."""
        self.recorded = dict(recorded)
        """The configuration as a checkpoint keeps it: a run resumes only under the same one ..."""
        self.may_differ = frozenset(may_differ)
        """... but for these fields."""
        self.rank, self.world_size = rank, world_size
        self.workers = int(trial["gang"]["workers"])
        """Workers that the trial asks for; each rank may stand for several (:attr:`share`)."""
        self.attempt = attempt
        """Number of this attempt; None on a rank that was not told."""
        self.pulse = Pulse()
        """To be beaten once a step, on every rank."""
        self.copies = os.environ.get(CHECKPOINTS)
        """Place in an object store that checkpoints are copied to, and found in."""
        self._stop_asked = stop_asked
        self._began = time.perf_counter()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes the trial's records."""
        return self.rank == 0

    @property
    def share(self) -> int:
        """Workers of the trial that each rank stands for."""
        return self.workers // self.world_size

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints, which outlive the attempt."""
        return self.folder / "checkpoints"

    @property
    def seed(self) -> int:
        return int(self.trial["seed"])

    def is_better(self, new: Mapping[str, float], old: Mapping[str, float] | None) -> bool:
        """Whether `new` beats `old` by the trial's objective, or by what chooses its evaluation; a
        missing value beats nothing."""
        objective = self.trial["objective"]
        by_heldout = objective.get("at") == "best_by_heldout"
        metric = objective["heldout" if by_heldout else "metric"]
        value = new.get(metric, math.nan)
        if not math.isfinite(value):
            return False
        if not old or metric not in old:
            return True
        maximize = self.trial["objective"].get("direction", "maximize") == "maximize"
        return value > old[metric] if maximize else value < old[metric]

    @property
    def leave(self) -> Leave:
        """Whether the run should end before its last step, and as what."""
        return "stopped" if self._stop_asked() else ""

    @property
    def why_diverged(self) -> str:
        """Which marker ended the run, and where."""
        return "a marker"

    def about(self, **known: Any) -> None:
        """What the markers must know of the run (:class:`ablate.markers.Context`); before the
        first step."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Measurements of a step (its number under ``step``): recorded, and judged."""

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Measurements of an evaluation after ``step`` steps: recorded, and judged."""

    def answers(self, row: Mapping[str, Any]) -> None:
        """Which images the evaluation after ``step`` steps got right; kept beside it."""

    def phase(self, name: str) -> None:
        """A sign of life for people: building, evaluating, saving."""

    def note(self, **facts: Any) -> None:
        """More for result.json."""

    def sync(self) -> None:
        """Bring all rows to the disk; before a checkpoint that later ones go on from."""

    def resumed(self, certificate: Mapping[str, Any]) -> None:
        """What this attempt went on from, for resumed.json."""

    def state(self) -> dict[str, Any] | None:
        """The markers' windows, for a checkpoint; None on ranks that judge nothing."""
        return None

    def load_state(self, state: Mapping[str, Any], *, step: int) -> None:
        """Put the markers where they were after `step` steps; under other thresholds, by the
        trace so far."""

    def conclude(self, ending: Ending) -> None:
        """Write result.json, unless it was only stopped; the worker does so after ``run``, a
        recipe that has more to say may do so before."""

    def learning(self, row: Mapping[str, Any]) -> None:
        """What weights and features say of a run that was concluded."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the logs; what was said is kept, a result is not made of it."""

    def give_up(self, status: Status, reason: str) -> None:
        """Write the result of a run that cannot go on; any rank may be the one that knows."""
        if self.attempt is None:
            return
        writer = AttemptWriter(self.folder, self.attempt)
        writer.result({"status": status, "reason": reason})
        writer.close()


class RecordingSession(Session):
    """Rank 0's session. Rows and signs of life are written in the background, in their order: a
    shared disk that hangs for a while holds no step up."""

    def __init__(
        self,
        trial: Mapping[str, Any],
        folder: Path,
        *,
        attempt: int,
        accuracy: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(trial, folder, rank=0, attempt=attempt, **options)
        self._writer = AttemptWriter(folder, attempt)
        self._scribe = Scribe()
        self._known: dict[str, Any] = {"accuracy": accuracy}
        self._judge: Monitor | None = None
        self._facts: dict[str, Any] = {}
        self._beat_at = -math.inf
        self._beat: dict[str, Any] = {"final": None, "skipped_steps": 0, "data_faults": 0}
        self._at = 0
        self._concluded = False
        self._machine = Machine()
        self._wait = DataWait()

    @property
    def monitor(self) -> Monitor:
        """The markers; what they must know of the run is known once they are asked."""
        if self._judge is None:
            thresholds = Thresholds(self.trial.get("markers") or {})
            self._judge = Monitor(thresholds, Context(**self._known))
        return self._judge

    @property
    def leave(self) -> Leave:
        return "diverged" if self.monitor.stop is not None else super().leave

    @property
    def why_diverged(self) -> str:
        stop = self.monitor.stop
        return f"marker {stop.marker} at step {stop.step}" if stop else "a marker"

    def about(self, **known: Any) -> None:
        assert self._judge is None, "said after the markers were asked"
        self._known |= known

    def step(self, row: Mapping[str, Any]) -> None:
        full = self._completed(row)
        self._tell(self.monitor.observe(full))
        self._scribe.write(lambda: self._writer.step([full]))
        self._at = full["step"]
        self._wait.add(full)
        if seen := self._machine.look():
            self._beat["slowed"] = slowed_cards([seen])
            place = {name: full[name] for name in ("step", "attempt", "time")}
            self._scribe.write(lambda: self._writer.machine({**place, **seen}))
        self._heartbeat("training", full)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        full = self._completed(row)
        self._scribe.write(lambda: self._writer.evaluation(full))
        self._at = full["step"]
        apart = ("step", "attempt", "time", "epoch")
        self._beat["final"] = {name: full[name] for name in full if name not in apart}
        self._tell(self.monitor.evaluate(full))

    def answers(self, row: Mapping[str, Any]) -> None:
        self._scribe.write(lambda: self._writer.answers(row))

    def phase(self, name: str) -> None:
        self._heartbeat(name)

    def note(self, **facts: Any) -> None:
        self._facts |= facts

    def sync(self) -> None:
        self._scribe.finish()
        self._writer.sync()

    def resumed(self, certificate: Mapping[str, Any]) -> None:
        write_json(self._writer.folder / "resumed.json", certificate)

    def state(self) -> dict[str, Any]:
        return self.monitor.state()

    def load_state(self, state: Mapping[str, Any], *, step: int) -> None:
        self._at = step
        try:
            self.monitor.load_state(state)
        except ValueError as error:
            log.info("markers judge the trace anew: %s", error)
            record = TrialRecord(self.folder)
            rows = [(row["step"], 0, row) for row in record.trace()]
            rows += [(row["step"], 1, row) for row in record.evaluations()]
            for at, kind, row in sorted(rows, key=lambda item: item[:2]):
                if at <= step:
                    self._tell((self.monitor.evaluate if kind else self.monitor.observe)(row))

    def conclude(self, ending: Ending) -> None:
        if self._concluded:
            return
        self._concluded = True
        if ending.status == "stopped":
            return
        ending = _without_a_score(ending, self.trial["objective"]["metric"])
        if ending.status in ("completed", "diverged"):
            self._tell(self.monitor.finish(), aloud=False)
        self._scribe.finish()
        verdict = self.monitor.verdict()
        diverged = ending.status == "diverged" and verdict.stop is not None
        self._writer.result(
            {
                "status": ending.status,
                "reason": verdict.message if diverged else ending.reason,
                "step": ending.step,
                "steps_total": ending.steps_total,
                "final": dict(ending.final),
                "best": dict(ending.best),
                "verdict": verdict.called,
                "flags": list(verdict.flags),
                "stop": asdict(verdict.stop) if verdict.stop else None,
                "markers": verdict.to_dict(),
                "context": asdict(self.monitor.context),
                "wall_s": time.perf_counter() - self._began,
                **self._facts,
            }
        )

    def learning(self, row: Mapping[str, Any]) -> None:
        self._writer.learning(row)

    def give_up(self, status: Status, reason: str) -> None:
        self._scribe.finish()
        self._writer.result({"status": status, "reason": reason})

    def __exit__(self, *error: object) -> None:
        self._scribe.close()
        self._writer.close()
        if error[0] is None:
            self._scribe.finish()

    def _completed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        step = int(row["step"])
        return {"step": step, "attempt": self.attempt, "time": round(time.time(), 3), **row}

    def _tell(self, events: Iterable[Event], *, aloud: bool = True) -> None:
        for event in events:
            if aloud:
                log.log(
                    logging.WARNING if event.severity in ("severe", "fatal") else logging.INFO,
                    "marker %s at step %d: %s",
                    event.marker,
                    event.first_step,
                    event.message,
                )
            self._scribe.write(partial(self._writer.event, event.to_dict()))

    def _heartbeat(self, phase: str, row: Mapping[str, Any] | None = None) -> None:
        now = time.monotonic()
        for name in ("skipped_steps", "data_faults"):
            if row and name in row:
                self._beat[name] = row[name]
        settled = time.perf_counter() - self._began > _SETTLED_S
        pace_s = _SETTLED_HEARTBEAT_S if settled else HEARTBEAT_S
        if row and now - self._beat_at < pace_s:
            return
        self._beat_at = now
        latest = ("loss", "samples_per_s", "epoch")
        beat = {
            "time": time.time(),
            "phase": phase,
            "step": self._at,
            "steps_total": self.monitor.context.steps_total,
            **{name: row[name] for name in latest if row and name in row},
            "data_wait": self._wait.share,
            **self._beat,
        }
        self._scribe.write(lambda: self._writer.heartbeat(beat))


def _without_a_score(ending: Ending, metric: str) -> Ending:
    """What ended well with an objective that nothing can be compared with has diverged."""
    value = ending.final.get(metric)
    if ending.status != "completed" or value is None or is_score(value):
        return ending
    return replace(ending, status="diverged", reason=f"{metric} is {value} at step {ending.step}")
