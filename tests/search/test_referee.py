"""Pruning through the study loop: who is ended, who never is, and the same after a relaunch."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from pruned_study import BETA2, STUDY, WD, with_prune
from scripted_studies import Recorder, prepare
from stepping_cluster import Stepping

from ablate.cluster.contract import Cluster
from ablate.cluster.local import LocalCluster
from ablate.errors import PlanError, StudyError
from ablate.records.files import dumps, read_rows
from ablate.records.folder import StudyRecord
from ablate.report.report import write_report
from ablate.runner import agenda, controller, hold
from ablate.runner.status import StudyStatus, summarise
from ablate.search import referee
from ablate.search.book import CellBook
from ablate.study import Study, design, parse_study

"""Levels of a factor, the baseline's first, which is nearly the worst; the last is the best."""
WORST = {"wd": "0.2", "beta2": "0.98"}


def quality(wd: str, beta2: str) -> float:
    """From 0 to 1, the same order early and at the end."""
    return (2 * WD.index(wd) + (wd != "0.2" and beta2 == "0.98")) / 16


def rules() -> list[dict[str, Any]]:
    return [
        {
            "match": {"wd": float(wd), "beta2": float(beta2)},
            "steps": 10,
            "evals": {"4": 0.1 + 0.1 * quality(wd, beta2), "6": 0.2 + 0.1 * quality(wd, beta2)},
            "value": 0.5 + 0.3 * quality(wd, beta2),
            "checkpoints": True,
        }
        for wd in WD
        for beta2 in BETA2
    ]


def run(
    study: Study, tmp_path: Path, *, stop_after: int = 99, cluster: Cluster | None = None
) -> tuple[StudyStatus, StudyRecord]:
    """Run a study with the real loop and book, on two gangs at a time."""
    record = StudyRecord(tmp_path / "runs" / study.name)
    score = functools.partial(design.score_of, study)
    book = CellBook(study, storage=tmp_path / "optuna.db", score=score)

    def ended() -> int:
        return sum(folder.outcome() is not None for folder in record.records())

    with hold.controlling(record):
        status = controller.launch(
            study,
            record,
            cluster=cluster or Stepping(2, rules),
            book=book,
            mirror=Recorder(),
            stop_level=lambda: int(stop_after < 99 and ended() >= stop_after),
            entry="tests.scripted:main",
        )
    book.close()
    assert book.trouble is None
    return status, record


def outcomes(study: Study, record: StudyRecord) -> dict[str, str]:
    """Cell and seed -> outcome."""
    found = {}
    for trial in agenda.planned(study, record):
        outcome = record.record(trial.id).outcome()
        name = f"{study.change_name(dict(trial.cell.levels))} {trial.seed}"
        found[name] = outcome["outcome"] if outcome else "waiting"
    return found


def decisions(record: StudyRecord) -> list[tuple[object, ...]]:
    """What was judged, in order, without times."""
    return [(r["trial"], r.get("rung"), r.get("decision"), r.get("final")) for r in record.rungs()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path, StudyStatus]:
    """A search that prunes, run to its end in one go."""
    folder = tmp_path_factory.mktemp("whole")
    study = prepare(folder, rules(), STUDY)
    status, _ = run(study, folder)
    return study, folder, status


def test_runs_that_fall_behind_are_ended_and_the_good_ones_are_not(
    whole: tuple[Study, Path, StudyStatus],
) -> None:
    """Behind at a rung ends a cell with all its seeds; the baseline and the best complete."""
    study, folder, status = whole
    record = StudyRecord(folder / "runs" / study.name)
    found = outcomes(study, record)
    assert len(found) == 32 and set(found.values()) == {"completed", "pruned"}
    assert status.outcomes["pruned"] >= 4 and status.waiting == 0
    assert found["baseline 0"] == found["baseline 1"] == "completed"
    assert found["wd=0.8, beta2=0.98 0"] == found["wd=0.8, beta2=0.98 1"] == "completed"
    for trial in agenda.planned(study, record):
        folder_of = record.record(trial.id)
        outcome = folder_of.outcome()
        assert outcome is not None
        if outcome["outcome"] == "pruned":
            assert outcome["value"] is None and "behind the others at rung" in outcome["reason"]
            assert outcome["step"] in (0, 4, 6)
    # A cell is ended as a whole, or not at all.
    by_cell: dict[str, set[str]] = {}
    for name, outcome_name in found.items():
        by_cell.setdefault(name[:-2], set()).add(outcome_name)
    assert all(len(kinds) == 1 for kinds in by_cell.values())
    assert status.unanswered == ()


def misleading() -> list[dict[str, Any]]:
    """The same scores at the rungs, reached as a fitted curve would read them the wrong way round:
    the worst rise steeply towards theirs, the best fall."""
    found = rules()
    for rule in found:
        at_rung, last = rule["evals"]["4"], rule["value"]
        slope = 0.5 * (0.65 - last)
        rule["evals"] |= {str(step): at_rung - slope * (4 - step) for step in (1, 2, 3)}
    return found


def test_no_curve_is_extrapolated(whole: tuple[Study, Path, StudyStatus], tmp_path: Path) -> None:
    """Whatever the curves look like before a rung, every decision at it is the same."""
    study, folder, _ = whole
    worst, *_, best = (
        np.polyval(np.polyfit([1, 2, 3, 4], [rule["evals"][str(n)] for n in (1, 2, 3, 4)], 1), 10)
        for rule in sorted(misleading(), key=lambda rule: rule["value"])
    )
    assert worst > 0.5 > 0 > best
    other = prepare(tmp_path, misleading(), STUDY)
    _, record = run(other, tmp_path, cluster=Stepping(2, misleading))
    told = StudyRecord(folder / "runs" / study.name)
    assert outcomes(other, record) == outcomes(study, told)
    assert [row[1:] for row in decisions(record)] == [row[1:] for row in decisions(told)]


def test_every_end_follows_from_what_was_known_then(
    whole: tuple[Study, Path, StudyStatus],
) -> None:
    """No run is ended before eight are complete, nor one above the middle of those before it."""
    study, folder, _ = whole
    rows = StudyRecord(folder / "runs" / study.name).rungs()
    ended = 0
    seen: dict[float, list[float]] = {}
    for row in rows:
        if "final" in row:
            ended += 1
            continue
        seen.setdefault(row["rung"], []).append(row["score"])
        if row["decision"] == "prune":
            assert ended >= 8
            better = sum(score > row["score"] for score in seen[row["rung"]])
            assert better >= len(seen[row["rung"]]) / 2 - 1
    assert any(row.get("decision") == "prune" for row in rows)


def test_optuna_sees_pruned_cells_with_their_scores(
    whole: tuple[Study, Path, StudyStatus],
) -> None:
    """A pruned cell stands there as PRUNED with the rung it was judged at; no value."""
    study, folder, _ = whole
    trials = optuna.load_study(
        study_name=study.name, storage=f"sqlite:///{folder / 'optuna.db'}"
    ).get_trials(deepcopy=False)
    pruned = [t for t in trials if t.state == optuna.trial.TrialState.PRUNED]
    found = outcomes(study, StudyRecord(folder / "runs" / study.name))
    assert len(trials) == 16
    assert 2 * len(pruned) == list(found.values()).count("pruned") > 0
    for trial in pruned:
        assert trial.value is None
        assert set(trial.intermediate_values) <= {40, 60} and trial.intermediate_values
    complete = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert all(set(t.intermediate_values) == {40, 60} for t in complete)
    best = max(complete, key=lambda t: t.value or 0)
    expected = 0.1 + 0.1 * quality(best.params["wd"], best.params["beta2"])
    assert best.intermediate_values[40] == pytest.approx(expected)


def test_gates_and_canaries_are_told_from_the_folder(
    whole: tuple[Study, Path, StudyStatus],
) -> None:
    """The controller and `ablate status` say the same about every rung."""
    study, folder, status = whole
    record = StudyRecord(folder / "runs" / study.name)
    told = summarise(study, record, agenda.planned(study, record)).pruning
    assert told == status.pruning
    assert [line.split(":")[0] for line in told[:2]] == ["rung 0.4", "rung 0.6"]
    assert all(": in use (tau 0.9" in line for line in told[:2])


def test_a_search_that_was_stopped_ends_the_same_runs(
    whole: tuple[Study, Path, StudyStatus], tmp_path: Path
) -> None:
    """Stopped twice and launched again: the same outcomes, the same decisions in the same order."""
    study, folder, _ = whole
    again = prepare(tmp_path, rules(), STUDY)
    for stop_after in (9, 21):
        status, _ = run(again, tmp_path, stop_after=stop_after)
        assert status.waiting + len(status.running) > 0
    status, record = run(again, tmp_path)
    before = StudyRecord(folder / "runs" / study.name)
    assert outcomes(again, record) == outcomes(study, before)
    assert decisions(record) == decisions(before)


def test_the_report_counts_what_was_ended_and_leaves_it_out(
    whole: tuple[Study, Path, StudyStatus], tmp_path: Path
) -> None:
    """Pruned cells take no part in shares and effects; their number and the rungs are told."""
    study, folder, status = whole
    written = write_report(study, StudyRecord(folder / "runs" / study.name), folder=tmp_path)
    found = json.loads(written.verdicts_json.read_text())
    num_pruned = status.outcomes["pruned"] // 2
    cells = found["search"]["cells"]
    assert (cells["pruned"], cells["completed"]) == (num_pruned, 16 - num_pruned)
    page = written.html.read_text()
    assert f"{num_pruned} cells are left out, having been ended early" in page
    assert all(line in page for line in status.pruning)
    assert "ended without a score" not in " ".join(step["text"] for step in found["next"])


def test_real_processes_are_ended_at_a_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that fell behind gets its signal, writes a checkpoint and ends as pruned."""
    monkeypatch.setattr(controller, "POLL_S", 0.02)
    text = STUDY.replace("seeds: [0, 1]", "seeds: [0]").replace("cells: 16", "cells: 12")
    script = [{**rule, "evals": {"4": rule["evals"]["4"]}} for rule in rules()]
    study = prepare(tmp_path, script, text.replace("rungs: [0.4, 0.6]", "rungs: [0.4]"))
    with LocalCluster(num_cpus=1) as cluster:
        status, record = run(study, tmp_path, cluster=cluster)
    assert status.outcomes["completed"] >= 8 and status.outcomes["pruned"] >= 1
    for folder in record.records():
        outcome = folder.outcome()
        assert outcome is not None
        if outcome["outcome"] == "pruned":
            [end] = folder.ends()
            assert (end["kind"], end["exit_codes"], end["step"]) == ("stopped", [75], 4)
            assert (folder.folder / "reached" / "4").is_dir()


def test_a_decision_that_was_not_come_to_is_carried_out_by_the_next_launch(tmp_path: Path) -> None:
    """Decided and written, then the controller died: the trial ends at the next launch unrun."""
    study = prepare(tmp_path, rules(), STUDY.replace("cells: 16", "cells: 2"))
    record = StudyRecord(tmp_path / "runs" / study.name)
    record.folder.mkdir(parents=True)
    cell = study.cell(WORST)
    for seed in study.seeds:
        trial = study.trial(cell, seed=seed)
        record.write_trial({**trial.to_json(), "fingerprint": {}})
    row = {"rung": 0.4, "step": 4, "steps_total": 10, "score": 0.1, "decision": "prune", "time": 0}
    record.log_rung({"trial": study.trial(cell, seed=1).id, **row})
    status, _ = run(study, tmp_path)
    assert status.outcomes == {"completed": 2, "pruned": 2}
    for seed in study.seeds:
        folder = record.record(study.trial(cell, seed=seed).id)
        assert folder.attempts() == []
        assert "4 of 10 steps" in (folder.outcome() or {})["reason"]


def test_what_follows_the_search_is_run_to_its_end(tmp_path: Path) -> None:
    """A cell that was ended early and that leave-one-out needs goes on, and is not ended again."""
    text = STUDY.replace("  prune:", "  then: leave_one_out\n  prune:")
    study = prepare(tmp_path, rules(), text)
    status, record = run(study, tmp_path)
    found = outcomes(study, record)
    winner = {"wd": "0.8", "beta2": "0.98"}
    for levels in design.leave_one_out(study.baseline_levels(), winner):
        for seed in study.seeds:
            assert found[f"{study.change_name(levels)} {seed}"] == "completed"
    assert status.waiting == 0 and status.outcomes["pruned"] > 0
    reopened = [row["trial"] for row in record.rungs() if row.get("decision") == "reopened"]
    assert len(reopened) == 2
    for trial_id in reopened:
        assert (record.record(trial_id).folder / "pruned.json").exists()
        assert len(record.record(trial_id).attempts()) in (1, 2)
    # A last launch finds nothing to do and undoes nothing.
    status, _ = run(study, tmp_path)
    assert outcomes(study, record) == found


def test_a_design_that_lists_its_cells_is_never_pruned(tmp_path: Path) -> None:
    """Only a search has rules for ending runs early; elsewhere the key does not exist."""
    study = parse_study(STUDY, path="s.yaml", root=tmp_path)
    listed = STUDY[: STUDY.index("design:")] + "design: full_factorial\nseeds: [0, 1]\n"
    assert referee.referee_of(study, StudyRecord(tmp_path)) is not None
    listed_study = parse_study(listed, path="s.yaml", root=tmp_path)
    assert referee.referee_of(listed_study, StudyRecord(tmp_path)) is None
    with pytest.raises(StudyError, match="unknown key 'prune'"):
        parse_study(
            listed.replace("full_factorial", "{name: full_factorial, prune: {rungs: [0.5]}}"),
            path="s.yaml",
            root=tmp_path,
        )


# --------------------------------------------------------------------------- what a study may ask


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (with_prune("{rungs: [0.1]}"), "s.yaml:13: design.prune.rungs: rung 0.1: early scores"),
        (with_prune("{rungs: [1.0]}"), "rung 1: early scores"),
        (with_prune("{rungs: [0.5, 0.5]}"), "a rung is listed twice"),
        (with_prune("{rungs: []}"), "design.prune.rungs:"),
        (with_prune("{rungs: [0.5], keep: 1.5}"), "design.prune.keep:"),
        (
            with_prune("{rungs: [0.5], speed_sensitive: [beta]}"),
            "s.yaml:13: design.prune.speed_sensitive[0]: 'beta' is not a factor; "
            "did you mean 'beta2'?",
        ),
        (
            with_prune(
                "{rungs: [0.5], speed_sensitive: [wd]}",
                ("[" + ", ".join(WD) + "]", "{low: 0.1, high: 0.9}"),
                ("sampler: grid", "sampler: tpe"),
            ),
            "wd is drawn from a range, so no two runs share its level",
        ),
        (
            with_prune("{rungs: [0.5]}", ("seeds:", "objective: {cost: gpu_hours}\nseeds:")),
            "design.prune: runs are compared by their score alone",
        ),
        (
            with_prune("{rung: [0.5]}"),
            "design.prune.rung: unknown key 'rung'",
        ),
    ],
)
def test_a_rule_that_would_fool_itself_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    """With the line of the study file, and what is allowed."""
    with pytest.raises(StudyError) as caught:
        parse_study(text, path="s.yaml", root=tmp_path)
    assert expected in str(caught.value)


def test_a_rung_within_a_warmup_is_refused_where_the_schedule_is_known(tmp_path: Path) -> None:
    """The longest warmup over the shortest schedule counts, over all combinations."""
    levels = ("beta2: [0.999, 0.98]", "warmup: [2, 4]\n  batch_size: [64, 80]")
    study = parse_study(with_prune("{rungs: [0.8, 0.5]}", levels), path="s.yaml", root=tmp_path)
    with pytest.raises(PlanError) as caught:  # 4 of 8 steps are warmup
        referee.advise(study)
    assert "s.yaml:14: design.prune.rungs[1]: rung 0.5 is too early" in str(caught.value)
    assert "the first rung allowed is 0.60" in str(caught.value)
    good = parse_study(with_prune("{rungs: [0.8, 0.6]}", levels), path="s.yaml", root=tmp_path)
    assert any("speed_sensitive: [warmup]" in note for note in referee.advise(good))
    assert any("1 in 10" in note for note in referee.advise(good))
    unknown = parse_study(
        with_prune("{rungs: [0.5]}", levels, ("train_num_samples: 640, ", "")),
        path="s.yaml",
        root=tmp_path,
    )
    assert any("before the data are counted" in note for note in referee.advise(unknown))


def test_a_rung_that_turns_out_to_lie_within_a_warmup_is_not_used(tmp_path: Path) -> None:
    """Where the data could not be counted before, the runs' own length shuts the rung."""
    study = parse_study(STUDY.replace("train_num_samples: 640, ", ""), path="s.yaml", root=tmp_path)
    record = StudyRecord(tmp_path / "runs")
    record.folder.mkdir()
    judge = referee.Referee(study, record)
    for number, (wd, beta2) in enumerate((w, b) for b in BETA2 for w in WD):
        trial = study.trial(study.cell({"wd": wd, "beta2": beta2}), seed=0)
        folder = record.write_trial(trial.to_json())
        place = folder.attempt_folder(record.new_attempt(folder))
        (place / "heartbeat.json").write_text(dumps({"steps_total": 5}))  # warmup takes 2 of them
        rows = [{"step": 2, "imagenet_top1": -float(number)}, {"step": 3, "imagenet_top1": 0.0}]
        (place / "evals.jsonl").write_text("".join(dumps(row) + "\n" for row in rows))
        assert judge.look([(trial, 1)]) == []
        judge.finish(trial, folder, -float(number))
    assert judge.describe()[0] == "rung 0.4: not in use: it lies within a warmup"
    assert {row["decision"] for row in read_rows(record.folder / "rungs.jsonl") if "rung" in row}


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_better_is_what_the_objective_calls_better(direction: str, tmp_path: Path) -> None:
    """Where less is better, it is the large scores that are ended."""
    study = parse_study(STUDY, path="s.yaml", root=tmp_path)
    goal = study.objective.model_copy(update={"direction": direction})
    object.__setattr__(study, "objective", goal)
    record = StudyRecord(tmp_path / "runs")
    record.folder.mkdir()
    judge = referee.Referee(study, record)
    cells = [study.cell({"wd": wd, "beta2": beta2}) for wd in WD for beta2 in BETA2]
    ended = []
    for number, cell in enumerate(cells):
        trial = study.trial(cell, seed=0)
        folder = record.write_trial(trial.to_json())
        place = folder.attempt_folder(record.new_attempt(folder))
        (place / "heartbeat.json").write_text(dumps({"steps_total": 10}))
        value = float(number) if number < 10 else 100.0 * (-1) ** number
        (place / "evals.jsonl").write_text(dumps({"step": 4, "imagenet_top1": value}) + "\n")
        ended += [value for _ in judge.look([(trial, 1)])]
        judge.finish(trial, folder, value)
    assert ended and all((value < 0) == (direction == "maximize") for value in ended)
