"""Drills: a real study on this machine, faults that befall it, and what must be true after it.

The study loop, the keeper and the worker are the real ones; the model is tiny and the data are
drawn shapes. Faults come from outside: signals to the ranks' processes and changes of their files,
at moments that are recognised by the trial's records. A drill is a function of a stage and a seed;
tests repeat each three times, `soak.py` by the hour.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import shutil
import signal
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from small_trials import fields

from ablate.cluster.contract import Cluster
from ablate.records.files import dumps
from ablate.records.folder import StudyRecord, TrialRecord
from ablate.report.report import write_report
from ablate.report.verify import compare_reports, find_remains, verify
from ablate.runner import agenda, controller, hold
from ablate.runner.breaker import BreakerRules
from ablate.runner.status import StudyStatus
from ablate.study import Study, parse_study

STEPS_PER_EPOCH = 6
EPOCHS = 3
STEPS = STEPS_PER_EPOCH * EPOCHS


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
    struck: bool = False
    """An earlier fault has befallen this attempt, whose processes may not have ended yet."""

    @property
    def step(self) -> int:
        """The last step that this attempt recorded."""
        return self.trial.last_step(self.attempt)

    @property
    def checkpoints(self) -> Path:
        return self.trial.folder / "checkpoints"

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Signal one rank, or all.

        Raises:
            psutil.NoSuchProcess: it has ended, or a fault is about to end it.
        """
        if self.struck:
            raise psutil.NoSuchProcess(self.pids[0])
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

    def report(self, cell: object, rung: float, score: float) -> None: ...

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
    status: StudyStatus | None = None
    """The latest of the study that runs."""

    def _watch(self, status: StudyStatus) -> None:
        self.status = status

    def stop_everything(self) -> None:
        """What a controller's own end does to its ranks."""
        for trial_id in self.cluster.pids():
            self.cluster.stop(trial_id, grace_s=0)
        while self.cluster.pids():
            time.sleep(0.01)
        self.cluster.wait(0)

    def run(
        self,
        text: str,
        *faults: Fault,
        data: Path | None = None,
        entry: str = controller.WORKER,
        folder: Path | None = None,
        mirror: Any = None,
        book: Any = None,
        stop_level: Callable[[], int] = lambda: 0,
        all_strike: bool = True,
        breaker_rules: BreakerRules | None = None,
    ) -> Run:
        """Run a study to its end while `faults` strike, one after the other."""
        self.count += 1
        study = parse_study(text, path="drill.yaml", root=data or self.data)
        record = StudyRecord(folder or self.folder / f"{self.count:03d}" / study.name)
        with hold.controlling(record), _striking(record, self.cluster, faults) as struck:
            status = controller.launch(
                study,
                record,
                cluster=self.cluster,
                book=book or Silent(),
                mirror=mirror or Silent(),
                stop_level=stop_level,
                watch=self._watch,
                entry=entry,
                breaker_rules=breaker_rules,
            )
        assert len(struck) == len(faults) or not all_strike, f"{len(struck)} faults struck"
        return Run(study, record, status, tuple(struck))

    def undisturbed(
        self, text: str, *, data: Path | None = None, entry: str = controller.WORKER
    ) -> Run:
        """The same study with nothing befalling it; run once."""
        key = (text, str(data), entry)
        if key not in self.references:
            self.references[key] = self.run(text, data=data, entry=entry)
            self.check(self.references[key])
        return self.references[key]

    def check(self, run: Run, *, same_as: Run | None = None) -> None:
        """The invariants: planned is ended, one winner, whole steps, same report, no remains."""
        trials = agenda.planned(run.study, run.record)
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
        # Nothing reads them now, and those of a long soak would fill the disk.
        for checkpoints in run.record.folder.glob("trials/*/checkpoints"):
            shutil.rmtree(checkpoints)

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
                known = any((s.trial_id, s.attempt) == (trial_id, attempts[-1]) for s in struck)
                found.append(Scene(trial, attempts[-1], pids, struck=known))
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


def allowed_s(bound_s: float) -> float:
    """A bound for a quiet machine, stretched by how loaded this one is; none in the suite, where
    no time decides (`ABLATE_TIMED=1` with the drills)."""
    if not os.environ.get("ABLATE_TIMED"):
        return math.inf
    return bound_s * max(2.0, os.getloadavg()[0] / (os.cpu_count() or 1))


# ------------------------------------------------------------------- faults


def kill_at_step(step: int, rank: int | None = None) -> Fault:
    """SIGKILL of one rank, or of all, once a first attempt has recorded the step."""

    def fault(scene: Scene) -> bool:
        if scene.attempt > 1 or scene.step < step:
            return False
        scene.send(signal.SIGKILL, rank)
        return True

    return fault


def at_step(step: int, act: Callable[[], None]) -> Fault:
    """Do something once any trial has recorded the step."""

    def fault(scene: Scene) -> bool:
        if scene.step < step:
            return False
        act()
        return True

    return fault


def in_checkpoint(*numbers: signal.Signals) -> Fault:
    """Signals to rank 0 while it writes a checkpoint."""

    def fault(scene: Scene) -> bool:
        if not any(scene.checkpoints.glob(".step-*.tmp")):
            return False
        for number in numbers:
            scene.send(number, 0)
        return True

    return fault


def preempt_at_step(
    step: int, *, again_s: float | None = None, kill_s: float | None = None
) -> Fault:
    """SIGTERM to all ranks; a second one, or SIGKILL, follows after so many seconds."""

    def fault(scene: Scene) -> bool:
        if scene.step < step:
            return False
        scene.send(signal.SIGTERM)
        for number, pause_s in ((signal.SIGTERM, again_s), (signal.SIGKILL, kill_s)):
            if pause_s is not None:
                time.sleep(pause_s)
                with contextlib.suppress(psutil.NoSuchProcess):
                    scene.send(number)
        return True

    return fault


def stop_process_at_step(step: int, rank: int) -> Fault:
    """SIGSTOP: the rank is there and does nothing."""

    def fault(scene: Scene) -> bool:
        if scene.attempt > 1 or scene.step < step:
            return False
        scene.send(signal.SIGSTOP, rank)
        return True

    return fault


def damage_and_kill(
    damage: Callable[[Path, random.Random], None], chance: random.Random, found: list[list[int]]
) -> Fault:
    """Damage checkpoints once the second one is there, with all ranks at rest, and kill them.

    The steps of the checkpoints that were there are added to `found`.
    """

    def fault(scene: Scene) -> bool:
        if scene.attempt > 1 or len(checkpoint_steps(scene.checkpoints)) < 2:
            return False
        scene.send(signal.SIGSTOP)
        found.append(checkpoint_steps(scene.checkpoints))
        damage(scene.checkpoints, chance)
        scene.send(signal.SIGKILL)
        return True

    return fault


def checkpoint_steps(checkpoints: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoints.glob("step-*"))


# ------------------------------------------------------------------- D1: a worker is killed


def killed_worker(stage: Stage, seed: int) -> Run:
    """A rank is killed at a random step, and another while a checkpoint is written."""
    chance = random.Random(seed)
    workers = 2 if seed % 3 == 1 else 1
    text = study_text(workers=workers)
    whole = stage.undisturbed(text)
    early = kill_at_step(chance.randrange(1, STEPS - 3), chance.randrange(workers))
    run = stage.run(text, early, in_checkpoint(signal.SIGKILL))
    stage.check(run, same_as=whole)
    for fault in run.struck:
        kind = run.kinds(fault.trial_id)[fault.attempt - 1]
        # In the last checkpoint: its last word may be said before the signal is there.
        assert kind == "crashed" or (kind == "ended" and fault.step == STEPS)
        assert_at_most_a_checkpoint_is_lost(run, fault)
    return run


def assert_at_most_a_checkpoint_is_lost(run: Run, fault: Struck) -> None:
    """The next attempt repeats less than the steps between two checkpoints."""
    first = run.record.record(fault.trial_id).first_row(fault.attempt + 1)
    if first is not None:  # else it ended after its last step
        # The step that ran when the fault struck may have been recorded after it.
        assert fault.step + 1 - first["step"] <= STEPS_PER_EPOCH


# ------------------------------------------------------------------- D6: checkpoints are damaged


def _newest(checkpoints: Path) -> Path:
    return max(checkpoints.glob("step-*"))


def _flip(checkpoints: Path, chance: random.Random) -> None:
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    path = _newest(checkpoints) / chance.choice(names)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _truncate(checkpoints: Path, chance: random.Random) -> None:
    path = _newest(checkpoints) / "optimizer.safetensors"
    os.truncate(path, chance.randrange(path.stat().st_size))


def _lose_manifest(checkpoints: Path, chance: random.Random) -> None:
    (_newest(checkpoints) / "manifest.json").unlink()


def _empty(checkpoints: Path, chance: random.Random) -> None:
    os.truncate(_newest(checkpoints) / "state.json", 0)


def _leave_over(checkpoints: Path, chance: random.Random) -> None:
    shutil.copytree(_newest(checkpoints), checkpoints / ".step-000018.0badc0de.tmp")


def _damage_all(checkpoints: Path, chance: random.Random) -> None:
    for path in checkpoints.glob("step-*"):
        os.truncate(path / "model.safetensors", chance.randrange(1000))


DAMAGES = ((_flip, _truncate), (_lose_manifest, _empty), (_leave_over, _damage_all))
"""What is done to the checkpoints of both trials of a study."""


def damaged_checkpoints(stage: Stage, seed: int) -> Run:
    """Checkpoints are damaged in each way there is: the one before counts, or step 0, loudly."""
    chance = random.Random(seed)
    damages = DAMAGES[seed % len(DAMAGES)]
    text = study_text(workers=1)
    whole = stage.undisturbed(text)
    there: list[list[int]] = []
    run = stage.run(text, *(damage_and_kill(damage, chance, there) for damage in damages))
    stage.check(run, same_as=whole)
    for fault, damage, steps in zip(run.struck, damages, there, strict=True):
        trial = run.record.record(fault.trial_id)
        valid = {_leave_over: steps[-1], _damage_all: 0}.get(damage, steps[-2])
        first = trial.first_row(2)
        assert (first["step"] if first else STEPS + 1) == valid + 1
        log = (trial.attempt_folder(2) / "log-0.txt").read_text()
        assert ("is damaged" in log) == (damage is not _leave_over)
        assert ("NO CHECKPOINT IS WHOLE" in log) == (damage is _damage_all)
    return run


# ------------------------------------------------------------------- D12: preemption


def preempted(stage: Stage, seed: int) -> Run:
    """SIGTERM with time enough, twice, while a checkpoint is written, and with too little time."""
    chance = random.Random(seed)
    text = study_text(workers=1) + "budget: {attempts: 1}\n"
    whole = stage.undisturbed(text)
    run = stage.run(
        text,
        preempt_at_step(chance.randrange(1, 4)),
        preempt_at_step(chance.randrange(1, 4), again_s=chance.random() / 20),
        in_checkpoint(signal.SIGTERM),
    )
    stage.check(run, same_as=whole)
    for fault in run.struck:
        trial = run.record.record(fault.trial_id)
        # From the last checkpoint a trial goes on to its end, which is near.
        expected = "preempted" if fault.step < STEPS else "ended"
        assert run.kinds(fault.trial_id)[fault.attempt - 1] == expected
        first = trial.first_row(fault.attempt + 1)
        assert first is None or first["step"] == trial.last_step(fault.attempt) + 1
    return run


def preempted_in_a_hurry(stage: Stage, seed: int) -> Run:
    """SIGKILL follows SIGTERM before a step can end: the last whole checkpoint counts."""
    chance = random.Random(seed)
    text = study_text(workers=1)
    whole = stage.undisturbed(text)
    run = stage.run(
        text,
        preempt_at_step(chance.randrange(1, STEPS - 6), kill_s=chance.random() / 50),
        in_checkpoint(signal.SIGTERM, signal.SIGKILL),
    )
    stage.check(run, same_as=whole)
    for fault in run.struck:
        assert_at_most_a_checkpoint_is_lost(run, fault)
    return run


# ------------------------------------------------------------------- D8: NaN on one rank


def nan_on_one_rank(stage: Stage, seed: int) -> Run:
    """One rank's images are NaN at a step, and a rank is killed before it: a result, once."""
    chance = random.Random(seed)
    step = chance.randrange(5, 2 * STEPS_PER_EPOCH)
    entry = f"drill_worker:nan_at_{step}"
    text = study_text(workers=2, epochs=2)
    whole = stage.undisturbed(text, entry=entry)
    early = kill_at_step(chance.randrange(1, step - 3), chance.randrange(2))
    run = stage.run(text, early, entry=entry)
    stage.check(run, same_as=whole)
    assert run.status.outcomes == whole.status.outcomes == {"diverged": 2}
    for trial in run.trials:
        outcome = trial.outcome()
        assert outcome is not None and outcome["value"] is None
        # The third row in a row is the end, or the parameters, which an evaluation looks at.
        epoch_end = -(-step // STEPS_PER_EPOCH) * STEPS_PER_EPOCH
        assert outcome["stop"]["step"] == min(step + 2, epoch_end)
        fatal = [row["first_step"] for row in trial.events() if row["severity"] == "fatal"]
        assert min(fatal) == step
    assert sorted(len(trial.attempts()) for trial in run.trials) == [1, 2]
    return run


# ------------------------------------------------------------------- D9: nothing moves


def stopped_rank(stage: Stage, seed: int) -> Run:
    """A rank is stopped by SIGSTOP: its gang is ended, the stacks are kept, and it goes on."""
    chance = random.Random(seed)
    text = study_text(workers=2)
    whole = stage.undisturbed(text)
    rank = chance.randrange(2)
    run = stage.run(text, stop_process_at_step(chance.randrange(1, STEPS - 2), rank))
    stage.check(run, same_as=whole)
    [fault] = run.struck
    trial = run.record.record(fault.trial_id)
    assert "stopped by a signal" in trial.ends()[0]["detail"]
    assert_stacks_are_kept(trial, rank=1 - rank)
    assert_at_most_a_checkpoint_is_lost(run, fault)
    return run


def hung_collective(stage: Stage, seed: int) -> Run:
    """One rank never comes to a step: the gang is ended after its patience and goes on."""
    step = random.Random(seed).randrange(2, STEPS - 2)
    text = study_text(workers=2)
    whole = stage.undisturbed(text)
    run = stage.run(text, entry=f"drill_worker:hang_at_{step}")
    stage.check(run, same_as=whole)
    for trial in run.trials:
        assert "no step or evaluation ended for" in trial.ends()[0]["detail"]
        for rank in (0, 1):
            assert_stacks_are_kept(trial, rank=rank)
    return run


def hung_evaluation(stage: Stage, seed: int) -> Run:
    """One rank never ends a batch of the first evaluation: the gang is ended and goes on."""
    text = study_text(workers=2)
    run = stage.run(text, entry="drill_worker:hung_evaluation")
    stage.check(run, same_as=stage.undisturbed(text))
    for trial in run.trials:
        assert [end["step"] for end in trial.ends()] == [STEPS_PER_EPOCH, STEPS]
        assert "no step or evaluation ended for" in trial.ends()[0]["detail"]
        assert_stacks_are_kept(trial, rank=1, where="hang")
    return run


def slow_evaluation(stage: Stage, seed: int) -> Run:
    """An evaluation is waited for as long as its batches end, however many there are."""
    text = study_text(workers=1)
    run = stage.run(text, entry="drill_worker:slow_evaluation")
    stage.check(run, same_as=stage.undisturbed(text))
    assert [len(trial.attempts()) for trial in run.trials] == [1, 1]
    return run


def assert_stacks_are_kept(trial: TrialRecord, *, rank: int, where: str = "run_steps") -> None:
    log = (trial.attempt_folder(1) / f"log-{rank}.txt").read_text()
    assert "Current thread" in log and f"in {where}" in log, log[-2000:]


# ------------------------------------------------------------------- D10: clocks


def clock_jumps(stage: Stage, seed: int) -> Run:
    """The time of day leaps an hour ahead and then back, for workers and for the controller."""
    chance = random.Random(seed)
    step = chance.randrange(2, STEPS - 2)
    text = study_text(workers=1)
    whole = stage.undisturbed(text)
    true, offset_s = time.time, [0.0]

    def jump(seconds: float) -> Fault:
        kill = kill_at_step(chance.randrange(2, STEPS - 2))

        def fault(scene: Scene) -> bool:
            if not kill(scene):
                return False
            offset_s[0] = seconds
            return True

        return fault

    time.time = lambda: true() + offset_s[0]
    began = time.monotonic()
    try:
        entry = f"drill_worker:clock_jumps_at_{step}"
        run = stage.run(text, jump(3600.0), jump(-3600.0), entry=entry)
    finally:
        time.time = true
    took_s = time.monotonic() - began
    stage.check(run, same_as=whole)
    for trial in run.trials:
        outcome = trial.outcome()
        assert outcome is not None and 0.0 < outcome["wall_s"] <= took_s
        assert len(trial.attempts()) == 2  # started again at once, whatever the clock said
        assert all(row["step_time_s"] >= 0 for row in trial.trace())
    return replace(run, struck=())  # by such clocks nothing can be timed


# ------------------------------------------------------------------- D7: bad data


def bad_data(stage: Stage, seed: int) -> Run:
    """Images, captions and a shard are damaged: the same substitutes, however often it is killed
    and however many loaders read."""
    chance = random.Random(seed)
    data = stage.folder / f"bad-{seed}-{stage.count}"
    shutil.copytree(stage.data, data)
    spoil(data / "train", chance)
    text = study_text(workers=1, max_fault_share=0.5)
    whole = stage.undisturbed(text, data=data)
    run = stage.run(text, kill_at_step(chance.randrange(1, STEPS - 3)), data=data)
    stage.check(run, same_as=whole)
    with_loaders = study_text(workers=1, max_fault_share=0.5).replace(
        '"workers": 0', '"workers": 2'
    )
    assert with_loaders != text
    loaded = stage.run(with_loaders, kill_at_step(chance.randrange(1, STEPS - 3)), data=data)
    stage.check(loaded)
    for trial in run.trials:
        faults = trial.trace()[-1]["data_faults"]
        assert faults > 0
        assert losses(trial) == losses(loaded.record.record(trial.trial_id))
    refused = stage.run(study_text(workers=1, max_fault_share=0.01), data=data)
    stage.check(refused)
    assert refused.status.outcomes == {"failed": 2}
    assert all("data fault" in str((t.outcome() or {})["reason"]) for t in refused.trials)
    assert [len(trial.attempts()) for trial in refused.trials] == [1, 1]
    return run


def losses(trial: TrialRecord) -> list[tuple[float, int]]:
    return [(row["loss"], row["data_faults"]) for row in trial.trace()]


def spoil(train: Path, chance: random.Random) -> None:
    """One shard ends early; in the others a few images are no images, too large, or wordless."""
    first, second, third = sorted(train.glob("*.tar"))
    os.truncate(first, first.stat().st_size * chance.randrange(60, 90) // 100)
    for path in (second, third):
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
        keys = sorted({name.split(".")[0] for name, _ in members})
        torn, bomb, wordless, twin = chance.sample(keys, 4)
        changed = []
        for name, content in members:
            key, kind = name.split(".")
            if key == torn and kind == "jpg":
                content = content[: len(content) // 3]
            elif key == bomb and kind == "jpg":
                content = huge_picture()
            elif key == wordless and kind == "txt":
                content = b""
            changed.append((name, content))
            if key == twin:
                changed.append((name, content))
        with tarfile.open(path, "w") as tar:
            for name, content in changed:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def huge_picture() -> bytes:
    """A few bytes that say they are 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


# ------------------------------------------------------------------- trials that cannot be run


def out_of_memory(stage: Stage, seed: int) -> Run:
    """The memory is not enough: an outcome at once, with the batch size to try."""
    step = random.Random(seed).randrange(1, STEPS)
    run = stage.run(study_text(workers=1), entry=f"drill_worker:no_memory_at_{step}")
    stage.check(run)
    assert run.status.outcomes == {"infeasible": 2}
    for trial in run.trials:
        assert len(trial.attempts()) == 1
        assert "batch_size" in (trial.outcome() or {})["reason"]
    return run


def broken_trial(stage: Stage, seed: int) -> Run:
    """A trial that always fails at its first step, of one error at one place, is given up after two
    attempts with its log; the study goes on."""
    run = stage.run(study_text(workers=1), entry="drill_worker:break_one")
    stage.check(run)
    assert run.status.outcomes == {"completed": 1, "failed": 1}
    [broken] = [t for t in run.trials if (t.outcome() or {})["outcome"] == "failed"]
    reason = (broken.outcome() or {})["reason"]
    assert "the same error at the same place in 2 attempts" in reason
    assert "it breaks at its first step" in reason
    assert len(broken.attempts()) == 2
    return run


# ------------------------------------------------------------------- a mix


def mixed(stage: Stage, seed: int) -> Run:
    """Up to five faults of any kind, at any time, on any trial that runs."""
    chance = random.Random(seed)
    text = study_text(workers=1 + seed % 2) + "budget: {attempts: 9}\n"
    whole = stage.undisturbed(text)
    run = stage.run(text, *(strike_by_chance(chance) for _ in range(5)), all_strike=False)
    stage.check(run, same_as=whole)
    return run


def strike_by_chance(chance: random.Random) -> Fault:
    """A kind of fault and a pause before it, chosen now."""
    kind = chance.choice(("kill", "kill one", "preempt", "hurry", "damage", "half-written"))
    pause_s, damage = chance.uniform(0.0, 2.0), chance.choice((_flip, _truncate, _empty))
    begun: list[float] = []

    def fault(scene: Scene) -> bool:
        begun.append(time.monotonic())
        if begun[-1] - begun[0] < pause_s:
            return False
        match kind:
            case "preempt":
                scene.send(signal.SIGTERM)
            case "hurry":
                scene.send(signal.SIGTERM)
                time.sleep(chance.random() / 20)
                scene.send(signal.SIGKILL)
            case "damage" if checkpoint_steps(scene.checkpoints):
                scene.send(signal.SIGSTOP)
                with contextlib.suppress(FileNotFoundError):  # deleted in this moment
                    damage(scene.checkpoints, chance)
                scene.send(signal.SIGKILL)
            case "half-written":
                (scene.trial.attempt_folder(scene.attempt) / ".x.json.0badc0de.tmp").touch()
                scene.send(signal.SIGKILL)
            case _:
                scene.send(signal.SIGKILL, 0 if kind == "kill one" else None)
        return True

    return fault


DRILLS: tuple[Callable[[Stage, int], Run], ...] = (
    killed_worker,
    damaged_checkpoints,
    preempted,
    preempted_in_a_hurry,
    nan_on_one_rank,
    stopped_rank,
    hung_collective,
    hung_evaluation,
    slow_evaluation,
    clock_jumps,
    bad_data,
    out_of_memory,
    broken_trial,
    mixed,
)
