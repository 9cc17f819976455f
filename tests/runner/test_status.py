"""The picture of a study that is read from its folder alone."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from scripted_studies import STUDY, Recorder, prepare
from simulated_cluster import Course, SimulatedCluster, complete
from synthetic import QUICK, study_of, write_study

from ablate.cli.display import render_status
from ablate.cluster.contract import Attempt
from ablate.records.attempt import AttemptWriter
from ablate.records.folder import StudyRecord
from ablate.report.report import write_report
from ablate.runner import controller
from ablate.runner.agenda import planned
from ablate.runner.budget import Ledger
from ablate.runner.status import picture, summarise
from ablate.words import describe_interruptions


def test_completed_trials_that_did_not_learn_are_told(tmp_path: Path) -> None:
    """By name, with the first flag or reason and the command that shows more; learners are not."""
    study = study_of(tmp_path, QUICK)
    record = write_study(tmp_path, study)
    usual = tuple(study.baseline_levels().items())
    trials = [t for t in planned(study, record) if t.cell.levels == usual][:2]
    writer = [AttemptWriter(record.record(trial.id).folder, 1) for trial in trials]
    writer[0].learning({"verdict": "learning", "flags": [], "reasons": ["neighbours rise"]})
    stuck = {"verdict": "not learning", "flags": ["no change"], "reasons": ["nothing moved"]}
    writer[1].learning(stuck)
    (note,) = summarise(study, record, planned(study, record)).notes
    folder = record.record(trials[1].id).folder
    assert note == f"baseline · seed 1: not learning (no change); ablate inspect {folder}"


def test_a_running_trial_that_waits_for_data_is_named(tmp_path: Path) -> None:
    """By what its sign of life says, and with its slowed cards; one that does not wait is not."""
    study = prepare(tmp_path, [], STUDY)
    record = StudyRecord(tmp_path / "runs" / study.name)
    running = [(trial, 1) for trial in planned(study, record)[:2]]
    for (trial, _), share in zip(running, (0.05, 0.62), strict=True):
        writer = AttemptWriter(record.write_trial(trial.to_json()).folder, 1)
        writer.heartbeat({"step": 9, "data_wait": share, "slowed": ["card 3 by heat"]})
    status = picture(
        study, record, Ledger(), running=running, num_trials=4, controller="running", notes=()
    )
    slow = f"{study.change_name(dict(running[1][0].cell.levels))}, seed {running[1][0].seed}"
    assert status.machines.startswith("1 of 2 trials waited for data for 20 % or more")
    assert f"most of all {slow} (62 %)" in status.machines
    assert "card 3 by heat" in status.machines
    with (console := Console(file=io.StringIO(), width=300)).capture() as shown:
        console.print(render_status(status))
    assert status.machines in shown.get()


def test_machines_that_were_taken_away_are_counted_with_what_they_cost(tmp_path: Path) -> None:
    """A preemption costs no step, a lost machine those since the checkpoint: the launch, `ablate
    status` of the ended study, a second launch and the report say the same."""
    study = prepare(tmp_path, [], STUDY)
    record = StudyRecord(tmp_path / "runs" / study.name)
    unlucky: dict[str, str] = {}

    def act(attempt: Attempt) -> Course:
        if attempt.number > 1 or len(unlucky) == 2:
            if unlucky.get(attempt.trial_id) == "lost":
                train(attempt, 4, 7)
            return complete(attempt) if attempt.trial_id not in unlucky else finish(attempt)
        kind = ("lost", "preempted")[len(unlucky)]
        unlucky[attempt.trial_id] = kind
        train(attempt, 1, 5)
        return Course(50.0, (75,) if kind == "preempted" else (None,), kind)

    def train(attempt: Attempt, first: int, last: int) -> None:
        writer = AttemptWriter(attempt.folder, attempt.number)
        for step in range(first, last + 1):
            writer.step([{"step": step, "attempt": attempt.number, "time": 0.0, "loss": 1.0}])
        writer.close()

    def finish(attempt: Attempt) -> Course:
        writer = AttemptWriter(attempt.folder, attempt.number)
        if unlucky[attempt.trial_id] == "preempted":
            train(attempt, 6, 7)
        final = {"imagenet_top1": 0.5}
        writer.result({"status": "completed", "step": 7, "final": final, "verdict": "STABLE"})
        writer.close()
        return Course(80.0)

    for _ in range(2):
        cluster = SimulatedCluster(2, act)
        told = Recorder()
        ended = controller.launch(
            study, record, cluster=cluster, book=told, mirror=told, clock=cluster.clock
        )
        seen = summarise(study, record, planned(study, record))
        # Two of the four steps of the second attempt, which took 80 s.
        assert ended.disruptions == seen.disruptions
        assert seen.disruptions == {"lost": 1, "preempted": 1, "again": 2, "again_worker_s": 40.0}
    said = describe_interruptions(seen.disruptions)
    assert said == "1 preemption, 1 lost machine: 2 steps trained again (0.011 h of workers)."
    assert said in write_report(study, record).markdown.read_text()
