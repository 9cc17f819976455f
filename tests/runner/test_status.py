"""The picture of a study that is read from its folder alone."""

from __future__ import annotations

from pathlib import Path

from scripted_studies import STUDY, Recorder, prepare
from simulated_cluster import Course, SimulatedCluster, complete
from synthetic import QUICK, study_of, write_study

from ablate.cluster.contract import Attempt
from ablate.records.attempt import AttemptWriter
from ablate.records.folder import StudyRecord
from ablate.report.report import write_report
from ablate.runner import controller
from ablate.runner.agenda import planned
from ablate.runner.status import summarise
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
