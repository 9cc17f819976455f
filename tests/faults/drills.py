"""Drills: a real study on this machine, faults that befall it, and what must be true after it.

The study loop, the keeper and the worker are the real ones; the model is tiny and the data are
drawn shapes. Faults come from outside: signals to the ranks' processes and changes of their files,
at moments that are recognised by the trial's records. A drill is a function of a stage and a seed;
tests repeat each three times, `soak.py` by the hour.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from small_trials import fields

from ablate import runner
from ablate.analysis.report import write_report
from ablate.cluster import Cluster
from ablate.records import StudyRecord, TrialRecord, dumps
from ablate.status import StudyStatus
from ablate.study import Study, parse_study
from ablate.verify import compare_reports, find_remains, verify

STEPS_PER_EPOCH = 6
EPOCHS = 3
STEPS = STEPS_PER_EPOCH * EPOCHS
PATIENCE_S = 120.0


def study_text(*, workers: int = 2, epochs: int = EPOCHS, **changes: Any) -> str:
    """A study of two trials, each of 3 epochs of 6 steps and an evaluation."""
    baseline = fields(batch_size=16 // workers, epochs=epochs, **changes)
    del baseline["beta2"]
    return (
        "name: drill\nrecipe: openclip\n"
        f"baseline: {dumps(baseline)}\n"
        "factors: {beta2: [0.98, 0.999]}\n"
        "seeds: [0]\n"
        f"gang: {{workers: {workers}}}\n"
    )


@dataclass(frozen=True, slots=True)
class Scene:
    """A trial that runs now."""

    trial: TrialRecord
    attempt: int
    pids: tuple[int, ...]

    @property
    def step(self) -> int:
        """The last step that this attempt recorded."""
        return self.trial.last_step(self.attempt)

    @property
    def checkpoints(self) -> Path:
        return self.trial.folder / "checkpoints"

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Signal one rank, or all."""
        for pid in self.pids if rank is None else self.pids[rank : rank + 1]:
            psutil.Process(pid).send_signal(number)


Fault = Callable[[Scene], bool]
"""Looks at a running trial; strikes when its moment has come, and says whether it did."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that happened."""

    trial_id: str
    attempt: int
    time: float
    step: int


@dataclass(frozen=True, slots=True)
class Run:
    """A study that was run, and what befell it."""

    study: Study
    record: StudyRecord
    status: StudyStatus
    struck: tuple[Struck, ...]

    @property
    def trials(self) -> list[TrialRecord]:
        return list(self.record.records())

    def recoveries_s(self) -> list[float]:
        """Seconds from each fault to the next attempt's first step."""
        found = []
        for fault in self.struck:
            again = self.record.record(fault.trial_id).first_row(fault.attempt + 1)
            found.append(again["time"] - fault.time if again else float("nan"))
        return found

    def kinds(self, trial_id: str) -> list[str]:
        """How each attempt of a trial ended."""
        return [end["kind"] for end in self.record.record(trial_id).ends()]


class Silent:
    """A book and a mirror that nobody looks at."""

    trouble = None

    def begin(self, cell: object) -> None: ...

    def ask(self) -> None: ...

    def tell(self, cell: object, results: object) -> None: ...

    def update(self, trials: object, active: object) -> None: ...


@dataclass(slots=True)
class Stage:
    """Where drills run: one warm cluster, one data set, and the runs that nothing befell."""

    folder: Path
    data: Path
    cluster: Cluster
    references: dict[tuple[str, str, str], Run] = field(default_factory=dict)
    digests: dict[Path, str] = field(default_factory=dict)
    count: int = 0

    def run(
        self,
        text: str,
        *faults: Fault,
        data: Path | None = None,
        entry: str = runner.WORKER,
        folder: Path | None = None,
        mirror: Any = None,
        book: Any = None,
        stop_level: Callable[[], int] = lambda: 0,
    ) -> Run:
        """Run a study to its end while `faults` strike, one after the other."""
        self.count += 1
        study = parse_study(text, path="drill.yaml", root=data or self.data)
        record = StudyRecord(folder or self.folder / f"{self.count:03d}" / study.name)
        with runner.controlling(record), _striking(record, self.cluster, faults) as struck:
            status = runner.launch(
                study,
                record,
                cluster=self.cluster,
                book=book or Silent(),
                mirror=mirror or Silent(),
                stop_level=stop_level,
                entry=entry,
            )
        return Run(study, record, status, tuple(struck))

    def undisturbed(
        self, text: str, *, data: Path | None = None, entry: str = runner.WORKER
    ) -> Run:
        """The same study with nothing befalling it; run once."""
        key = (text, str(data), entry)
        if key not in self.references:
            self.references[key] = self.run(text, data=data, entry=entry)
            self.check(self.references[key])
        return self.references[key]

    def check(self, run: Run, *, same_as: Run | None = None) -> None:
        """The invariants: planned is ended, one winner, whole steps, same report, no remains."""
        trials = runner.planned(run.study, run.record)
        assert {trial.id for trial in trials} == {
            folder.trial_id for folder in run.record.records() if folder.outcome() is not None
        }
        metric = run.study.objective.metric
        found = verify(run.record, trials, metric=metric) + find_remains(run.record.folder)
        assert found == []
        if same_as is not None and self._digest(run) != self._digest(same_as):
            raise AssertionError(
                compare_reports((run.study, run.record), (same_as.study, same_as.record))
            )

    def _digest(self, run: Run) -> str:
        if run.record.folder not in self.digests:
            aside = run.record.folder.parent / "report"
            written = write_report(run.study, run.record, folder=aside)
            self.digests[run.record.folder] = written.digest
        return self.digests[run.record.folder]


@contextmanager
def _striking(
    record: StudyRecord, cluster: Cluster, faults: Sequence[Fault]
) -> Iterator[list[Struck]]:
    """Watch the running trials from a thread, and let each fault strike at its moment."""
    struck: list[Struck] = []
    over = threading.Event()
    errors: list[BaseException] = []

    def look() -> None:
        try:
            for fault in faults:
                while not any(strike(fault, scene) for scene in scenes()):
                    if over.wait(0.002):
                        return
        except BaseException as error:  # told at the end, by the test's own thread
            errors.append(error)

    def scenes() -> list[Scene]:
        found = []
        for trial_id, pids in cluster.pids().items():
            trial = record.record(trial_id)
            if attempts := trial.attempts():
                found.append(Scene(trial, attempts[-1], pids))
        return found

    def strike(fault: Fault, scene: Scene) -> bool:
        try:
            done = fault(scene)
        except psutil.NoSuchProcess:  # it ended in this moment
            return False
        if done:
            struck.append(Struck(scene.trial.trial_id, scene.attempt, time.time(), scene.step))
        return done

    thread = threading.Thread(target=look, name="faults")
    thread.start()
    try:
        yield struck
    finally:
        over.set()
        thread.join()
    assert not errors, errors
    assert len(struck) == len(faults), f"{len(struck)} of {len(faults)} faults struck"


# ------------------------------------------------------------------- D1: a worker is killed


def kill_at_step(step: int, rank: int | None) -> Fault:
    """SIGKILL of one rank, or of all, once the step is recorded."""

    def fault(scene: Scene) -> bool:
        if scene.attempt > 1 or scene.step < step:
            return False
        scene.send(signal.SIGKILL, rank)
        return True

    return fault


def kill_in_checkpoint(rank: int) -> Fault:
    """SIGKILL while a checkpoint is being written."""

    def fault(scene: Scene) -> bool:
        if scene.attempt > 1 or not any(scene.checkpoints.glob(".step-*.tmp")):
            return False
        scene.send(signal.SIGKILL, rank)
        return True

    return fault


def killed_worker(stage: Stage, seed: int) -> Run:
    """A rank is killed at a random step, and rank 0 while a checkpoint is written."""
    chance = random.Random(seed)
    text = study_text()
    whole = stage.undisturbed(text)
    run = stage.run(
        text,
        kill_at_step(chance.randrange(1, STEPS - 1), chance.randrange(2)),
        kill_in_checkpoint(0),
    )
    stage.check(run, same_as=whole)
    for fault in run.struck:
        assert run.kinds(fault.trial_id)[:1] == ["crashed"]
        first = run.record.record(fault.trial_id).first_row(fault.attempt + 1)
        if first is not None:  # else it was killed after the last step
            assert fault.step - first["step"] < STEPS_PER_EPOCH
    return run
