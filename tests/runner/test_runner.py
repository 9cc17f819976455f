"""The study loop: every trial ends in one outcome, whatever dies on the way."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from scripted_studies import STUDY, TRIALS, Recorder, attempts, prepare, run
from stepping_cluster import Stepping

from ablate.cluster.contract import Attempt, Capacity, GangEvent, Shape
from ablate.cluster.local import LocalCluster
from ablate.errors import ClusterError, PlacementError, RecordError
from ablate.records.folder import StudyRecord
from ablate.runner import agenda, controller, hold
from ablate.runner.attempts import carried
from ablate.runner.hold import read_controller
from ablate.runner.status import StudyStatus, summarise
from ablate.search.book import CellBook
from ablate.study import Study, design


def test_a_study_runs_every_trial_once_and_tells_each_cell_once(tmp_path: Path) -> None:
    """3 cells x 2 seeds give 6 completed trials of one attempt each, and 3 told cells."""
    status, record, told = run(prepare(tmp_path, []), tmp_path)
    assert status.outcomes == {"completed": TRIALS}
    assert (status.waiting, status.running) == (0, ())
    assert set(attempts(record).values()) == {1}
    assert [sorted(r.value or 0 for r in results) for _, results in told.told] == [[0.5, 0.51]] * 3


def test_launching_again_runs_only_what_was_added(tmp_path: Path) -> None:
    """Finished trials are kept; an added level and an added seed bring just their trials."""
    _, record, _ = run(prepare(tmp_path, []), tmp_path)
    before = attempts(record)
    run(prepare(tmp_path, []), tmp_path)
    assert attempts(record) == before
    more = STUDY.replace("[5, 1]", "[5, 1, 3]").replace("[0, 1]", "[0, 1, 2]")
    status, _, _ = run(prepare(tmp_path, [], more), tmp_path)
    after = attempts(record)
    assert status.outcomes == {"completed": 4 * 3}
    assert {key: after[key] for key in before} == before


def test_a_crash_is_retried_and_does_not_count_as_a_result(tmp_path: Path) -> None:
    """A worker that dies twice is attempted a third time and completes."""
    rules = [{"match": {"warmup": 1}, "crashes": 2, "steps": 3}]
    status, record, _ = run(prepare(tmp_path, rules), tmp_path)
    assert status.outcomes == {"completed": TRIALS}
    assert sorted(attempts(record).values()) == [1, 1, 1, 1, 3, 3]


def test_a_trial_that_keeps_dying_is_given_up_with_its_log(tmp_path: Path) -> None:
    """Without progress the budgeted attempts end in `failed`, and the other trials complete."""
    rules = [{"match": {"warmup": 1, "seed": 0}, "crashes": 99}]
    text = STUDY + "budget: {attempts: 2}\n"
    status, record, told = run(prepare(tmp_path, rules, text), tmp_path)
    assert status.outcomes == {"completed": TRIALS - 1, "failed": 1}
    [failed] = [o for f in record.records() if (o := f.outcome()) and o["outcome"] == "failed"]
    assert "2 attempts without progress" in failed["reason"]
    assert "RuntimeError: the script says crash" in failed["reason"]
    assert failed["value"] is None
    assert len(told.told) == 3


def test_a_trial_that_never_takes_a_step_is_broken_after_five_attempts(tmp_path: Path) -> None:
    """Five attempts that die before their first step mark the trial broken; the study goes on."""
    study = prepare(tmp_path, [{"match": {"warmup": 1, "seed": 0}, "breaks": True}])
    status, record, _ = run(study, tmp_path)
    assert status.outcomes == {"completed": TRIALS - 1, "failed": 1}
    [failed] = [o for f in record.records() if (o := f.outcome()) and o["outcome"] == "failed"]
    assert failed["attempt"] == 5
    assert failed["reason"].startswith("broken: no attempt finished a step. 5 attempts")
    assert "the script says break" in failed["reason"]


def test_what_failed_is_tried_again_when_its_cause_is_mended(tmp_path: Path) -> None:
    """It has all its attempts anew, goes on with the next number, and only it is run."""
    text = STUDY + "budget: {attempts: 2}\n"
    broken = {"match": {"warmup": 1, "seed": 0}, "breaks": True}
    run(prepare(tmp_path, [broken], text), tmp_path)
    record = StudyRecord(tmp_path / "runs" / "scripted")
    assert agenda.reopen_unanswered(record) == 1
    crashing = {"match": {"warmup": 1, "seed": 0}, "crashes": 3}
    status, record, _ = run(prepare(tmp_path, [crashing], text), tmp_path)
    assert status.outcomes == {"completed": TRIALS}
    assert sorted(attempts(record).values()) == [1, 1, 1, 1, 1, 4]
    assert agenda.reopen_unanswered(record) == 0


def test_progress_renews_the_attempts(tmp_path: Path) -> None:
    """A trial that dies at every attempt, but each time a checkpoint further, completes."""
    rules = [{"match": {"warmup": 1}, "crashes": 4, "steps": 5, "checkpoints": True}]
    text = STUDY + "budget: {attempts: 2}\n"
    status, record, _ = run(prepare(tmp_path, rules, text), tmp_path)
    assert status.outcomes == {"completed": TRIALS}
    assert sorted(attempts(record).values()) == [1, 1, 1, 1, 5, 5]


def test_diverged_is_a_result(tmp_path: Path) -> None:
    """A diverged trial is recorded once, without a value, and is never retried."""
    rules = [{"match": {"beta2": 0.98}, "status": "diverged", "reason": "loss is NaN"}]
    status, record, _ = run(prepare(tmp_path, rules), tmp_path)
    assert status.outcomes == {"completed": 4, "diverged": 2}
    assert set(attempts(record).values()) == {1}
    for folder in record.records():
        outcome = folder.outcome()
        assert outcome is not None
        if outcome["outcome"] == "diverged":
            assert (outcome["value"], outcome["reason"]) == (None, "loss is NaN")


def test_a_trial_without_the_objective_says_what_it_measured(tmp_path: Path) -> None:
    """Completed without the study's objective is `failed`, with the measurements it had."""
    text = STUDY + "objective: {metric: knn_top1}\n"
    status, record, _ = run(prepare(tmp_path, [], text), tmp_path)
    assert status.outcomes == {"failed": TRIALS}
    reason = next(iter(record.records())).outcome()["reason"]  # type: ignore[index]
    assert "without knn_top1" in reason and "imagenet_top1" in reason


def test_stopping_lets_trials_checkpoint_and_the_next_launch_goes_on(tmp_path: Path) -> None:
    """After a stop nothing runs and nothing is lost; launching again completes the study."""
    study = prepare(tmp_path, [{"hold": True}])
    seen: list[StudyStatus] = []
    status, record, _ = run(
        study,
        tmp_path,
        stop_level=lambda: int(
            any(len(s.running) == 2 and all(t.step for t in s.running) for s in seen)
        ),
        watch=seen.append,
    )
    assert status.outcomes == {} and status.waiting == TRIALS
    ends = [end for folder in record.records() for end in folder.ends()]
    assert [(end["kind"], end["exit_codes"]) for end in ends] == [("stopped", [75])] * 2
    (tmp_path / "release").touch()
    status, _, _ = run(study, tmp_path)
    assert status.outcomes == {"completed": TRIALS}


def test_stop_can_be_asked_from_another_process(tmp_path: Path) -> None:
    """A stop request left in the folder ends the launch; the next one clears it."""
    study = prepare(tmp_path, [{"hold": True}])
    record = StudyRecord(tmp_path / "runs" / study.name)

    def ask(status: StudyStatus) -> None:
        if status.running and status.running[0].step:
            hold.request_stop(record, now=True)

    status, _, _ = run(study, tmp_path, watch=ask)
    assert status.outcomes == {}
    (tmp_path / "release").touch()
    assert run(study, tmp_path)[0].outcomes == {"completed": TRIALS}


def test_only_one_controller_works_on_a_folder(tmp_path: Path) -> None:
    """A second launch on the same folder is refused and says who holds it."""
    record = StudyRecord(tmp_path / "s")
    with hold.controlling(record), pytest.raises(RecordError, match="another launch"):
        with hold.controlling(record):
            pass
    with hold.controlling(record):
        pass


def test_a_gang_that_fits_nowhere_is_refused_with_the_missing_resource(tmp_path: Path) -> None:
    """Asking for more cores than there are ends in PlacementError, not in waiting."""
    study = prepare(tmp_path, [], STUDY + "gang: {workers: 3}\n")
    with pytest.raises(PlacementError, match="3 workers does not fit"):
        run(study, tmp_path)


def search(study: Study, tmp_path: Path, *, stop_after: int = 99) -> tuple[StudyStatus, CellBook]:
    """Run a search with the real book; ask to stop once `stop_after` trials have ended."""
    record = StudyRecord(tmp_path / "runs" / study.name)
    book = CellBook(
        study, storage=tmp_path / "optuna.db", score=functools.partial(design.score_of, study)
    )
    seen: list[StudyStatus] = []
    with hold.controlling(record), LocalCluster(num_cpus=1) as cluster:
        status = controller.launch(
            study,
            record,
            cluster=cluster,
            book=book,
            mirror=Recorder(),
            stop_level=lambda: int(any(s.num_ended >= stop_after for s in seen)),
            watch=seen.append,
            entry="tests.scripted:main",
        )
    book.close()
    return status, book


def test_a_search_asks_for_its_cells_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    """Five distinct cells with both seeds each, the best found first reverted one by one."""
    text = STUDY.replace("[5, 1]", "[5, 1, 2, 3]").replace("[0.999, 0.98]", "[0.999, 0.98, 0.9]")
    text = text.replace(
        "design: one_at_a_time", "design: {name: search, cells: 5, then: leave_one_out}"
    )
    best = {"match": {"warmup": 3}, "value": 0.8}
    study = prepare(tmp_path, [best, {"value": 0.3}], text)
    status, _ = search(study, tmp_path, stop_after=3)
    assert 3 <= status.num_ended < 10
    status, _ = search(study, tmp_path)
    assert status.waiting == 0 and set(status.outcomes) == {"completed"}
    trials = agenda.planned(study, StudyRecord(tmp_path / "runs" / study.name))
    cells = {trial.cell.levels for trial in trials}
    assert len(trials) == 2 * len(cells) == status.num_ended
    assert len(cells) >= 5 and tuple(study.baseline_levels().items()) in cells


DRIVER = """
import sys
from pathlib import Path
from scripted_studies import run, parse_study
tmp_path = Path(sys.argv[1])
study = parse_study((tmp_path / "s.yaml").read_text(), path="s.yaml", root=tmp_path)
run(study, tmp_path)
"""


def test_a_killed_controller_loses_no_finished_trial_and_leaves_no_process(tmp_path: Path) -> None:
    """After SIGKILL of the controller its workers die; launching again keeps what had ended."""
    study = prepare(tmp_path, [{"match": {"seed": 1}, "hold": True}])
    (tmp_path / "s.yaml").write_text(STUDY)
    record = StudyRecord(tmp_path / "runs" / study.name)
    repository = Path(__file__).parents[2]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'tests'}"},
        start_new_session=True,
    )
    try:
        wait_for(lambda: held(study, record), deadline_s=120)
        children = psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert children
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    assert read_controller(record) is None
    ended = {f.trial_id: f.outcome() for f in record.records() if f.outcome() is not None}
    assert len(ended) == 3
    (tmp_path / "release").touch()
    status, _, _ = run(study, tmp_path)
    assert status.outcomes == {"completed": TRIALS}
    assert {f.trial_id: f.outcome() for f in record.records() if f.trial_id in ended} == ended


def held(study: Study, record: StudyRecord) -> bool:
    """Seed 0 has ended and the cluster is full of trials that wait to be released."""
    if record.study() is None:
        return False
    status = summarise(study, record, agenda.planned(study, record))
    return status.num_ended == 3 and sum(t.step > 0 for t in status.running) == 2


def wait_for(condition: Callable[[], bool], *, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.05)


def test_nothing_is_begun_while_nobody_answers_who_could_place_it(tmp_path: Path) -> None:
    """Trials that had to leave a silent cluster wait, and go on when it answers again."""
    study = prepare(tmp_path, [])
    cluster = Leaving()
    record = StudyRecord(tmp_path / "runs" / study.name)
    with hold.controlling(record):
        mirror = Recorder()
        status = controller.launch(study, record, cluster=cluster, book=mirror, mirror=mirror)
    assert status.outcomes == {"completed": TRIALS}
    assert cluster.begun_in_silence == 0
    assert sorted(attempts(record).values()) == [1, 1, 1, 1, 2, 2]


def test_a_cluster_that_ends_is_told_and_the_next_launch_goes_on(tmp_path: Path) -> None:
    """What ran has left and is written down before the launch says why it cannot go on."""
    study = prepare(tmp_path, [])
    record, mirror = StudyRecord(tmp_path / "runs" / study.name), Recorder()
    ending, well = Leaving(ends="its head is taken away"), Stepping(2, list)
    with hold.controlling(record):
        with pytest.raises(ClusterError, match="its head is taken away"):
            controller.launch(study, record, cluster=ending, book=mirror, mirror=mirror)
        assert ending.running == {}
        assert [end["kind"] for folder in record.records() for end in folder.ends()] == [
            "stopped",
            "stopped",
        ]
        status = controller.launch(study, record, cluster=well, book=mirror, mirror=mirror)
    assert status.outcomes == {"completed": TRIALS}
    assert sorted(attempts(record).values()) == [1, 1, 1, 1, 2, 2]


class Leaving(Stepping):
    """Two seats; asks for them at its second turn, and is silent for the next ten, or `ends`."""

    turns = begun_in_silence = 0

    def __init__(self, *, ends: str = "") -> None:
        super().__init__(2, lambda: [{"match": {}, "steps": 5}])
        self.ends = ends

    def start(self, attempt: Attempt) -> None:
        self.begun_in_silence += self.silent
        super().start(attempt)

    def wait(self, timeout_s: float) -> list[GangEvent]:
        self.turns += 1
        if self.turns == 2:
            for trial_id in list(self.running):
                self.stop(trial_id, grace_s=0.0)
        return super().wait(timeout_s)

    def capacity(self, shape: Shape) -> Capacity:
        ends = self.ends if self.turns >= 2 else ""
        return replace(super().capacity(shape), silent=self.silent, ends=ends)

    @property
    def silent(self) -> bool:
        return not self.ends and 2 <= self.turns < 12


def test_what_is_set_for_a_launch_reaches_its_ranks_and_secrets_do_not() -> None:
    """On machines whose Ray was started in another environment: patience, caches, NCCL, a profile;
    nothing that is a machine's own."""
    told = {"ABLATE_PATIENCE_S": "7", "AWS_PROFILE": "mine", "HF_HOME": "/x", "NCCL_DEBUG": "INFO"}
    kept = {"HF_TOKEN": "t", "NCCL_SOCKET_IFNAME": "eth1", "ABLATE_STORE_FD": "3", "PATH": "/bin",
            "AWS_SECRET_ACCESS_KEY": "k", "RAY_AUTH_TOKEN": "r"}  # fmt: skip
    assert carried({**told, **kept}) == told
