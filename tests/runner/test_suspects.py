"""A machine that fails what others can run costs no trial its outcome."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from scripted_studies import STUDY, TRIALS, Recorder, prepare
from simulated_cluster import Course, SimulatedCluster, complete

from ablate.cluster.contract import Attempt, Capacity, Shape
from ablate.cluster.local import LocalCluster
from ablate.records.attempt import AttemptWriter
from ablate.records.files import read_json, write_json
from ablate.records.folder import StudyRecord
from ablate.runner import controller, hold
from ablate.runner.status import StudyStatus


class Uneven(SimulatedCluster):
    """Attempts fail at once on `broken` machines, and everywhere in trials with a `warmup`."""

    def __init__(
        self, *seats: str, broken: tuple[str, ...] = (), warmup: int | None = None
    ) -> None:
        super().__init__(len(seats), self.attempt, seats=seats)
        self.broken, self.warmup = broken, warmup
        self.tried: Counter[str] = Counter()

    def attempt(self, attempt: Attempt) -> Course:
        machine = self.machine_of[attempt.trial_id]
        self.tried[machine] += 1
        config = read_json(attempt.folder / "trial.json")["config"]
        if machine in self.broken or config["warmup"] == self.warmup:
            return Course(1.0, (1,))
        return complete(attempt)


class Sick(Uneven):
    """One accelerator of the machine "sick" breaks in the middle of every other attempt there."""

    def attempt(self, attempt: Attempt) -> Course:
        machine = self.machine_of[attempt.trial_id]
        self.tried[machine] += 1
        if machine == "sick" and self.tried[machine] % 2:
            writer = AttemptWriter(attempt.folder, attempt.number)
            step = 100 * attempt.number
            writer.step([{"step": step, "attempt": attempt.number, "time": 0.0, "loss": 1.0}])
            writer.close()
            return Course(30.0, (1,), last_words="CUDA error: uncorrectable ECC error encountered")
        return complete(attempt)


def launch(cluster: Uneven, folder: Path, text: str = STUDY) -> tuple[StudyStatus, StudyRecord]:
    study = prepare(folder, [], text)
    record, told = StudyRecord(folder / "runs" / study.name), Recorder()
    with hold.controlling(record):
        status = controller.launch(
            study, record, cluster=cluster, book=told, mirror=told, clock=cluster.clock
        )
    return status, record


def test_a_machine_on_which_every_trial_fails_is_set_aside(tmp_path: Path) -> None:
    """It takes a few tries, no more; every trial completes on the others, and the status says
    which machine it is and what was said there."""
    cluster = Uneven("good", "bad", "bad", broken=("bad",))
    status, _ = launch(cluster, tmp_path)
    assert status.outcomes == {"completed": TRIALS}
    assert 3 <= cluster.tried["bad"] <= 6
    [note] = status.notes
    assert note.startswith("bad is set aside") and "exit codes (1,)" in note


def test_a_machine_whose_accelerator_breaks_is_set_aside(tmp_path: Path) -> None:
    """However far its attempts got, and though others complete there: the driver's words say so."""
    cluster = Sick("good", "sick", "sick")
    status, _ = launch(cluster, tmp_path, STUDY.replace("[0, 1]", str(list(range(8)))))
    assert status.outcomes == {"completed": 4 * TRIALS}
    assert cluster.tried["sick"] <= 7 < cluster.tried["good"]
    [note] = status.notes
    assert note.startswith("sick is set aside") and "uncorrectable ECC" in note


def test_a_trial_that_fails_everywhere_is_at_fault_itself(tmp_path: Path) -> None:
    """No machine is set aside for the trials of a level that breaks on all of them."""
    status, _ = launch(Uneven("one", "two", warmup=1), tmp_path)
    assert status.outcomes == {"completed": TRIALS - 2, "failed": 2}
    assert status.notes == ()


def test_one_machine_s_word_gives_no_trial_up(tmp_path: Path) -> None:
    """Where too few trials are left to suspect the machine, they wait for another."""
    text = STUDY.replace("  beta2: [0.999, 0.98]\n", "").replace("[0, 1]", "[0]")
    cluster = Uneven("good", "bad", broken=("bad",))
    status, _ = launch(cluster, tmp_path, text)
    assert status.outcomes == {"completed": 2} and status.notes == ()
    assert cluster.tried["bad"] > 5


class Slow(Uneven):
    """Two machines; the good one has no room before the other was tried a few times."""

    def attempt(self, attempt: Attempt) -> Course:
        course = super().attempt(attempt)
        if course.exit_codes == (1,):
            said = {"text": "ValueError: no number", "place": "pulse.py:55 in __init__"}
            write_json(attempt.folder / "attempts" / str(attempt.number) / "error-0.json", said)
        if self.tried["bad"] == 4 and "good" not in self._seats:
            self._seats.append("good")
            self.gangs = 2
        return course

    def capacity(self, shape: Shape) -> Capacity:
        return replace(super().capacity(shape), machines=2)


def test_a_machine_that_never_held_a_rank_is_a_machine_all_the_same(tmp_path: Path) -> None:
    """Two attempts that die alike on the one that came first give no trial up."""
    status, _ = launch(Slow("bad", broken=("bad",)), tmp_path)
    assert status.outcomes == {"completed": TRIALS}


def test_the_last_machine_is_never_set_aside(tmp_path: Path) -> None:
    """Where nothing else is left the trials are given up one by one, with their reason."""
    status, _ = launch(Uneven("bad", "bad", broken=("bad",)), tmp_path)
    assert status.outcomes == {"failed": TRIALS} and status.notes == ()
    with LocalCluster(num_cpus=1) as cluster:
        assert not cluster.set_aside("here", Shape(1))
