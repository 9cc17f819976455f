"""A killed trial comes back as if nothing had happened; leaving out any state is noticed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_trials import Ranks, run, start, wait_for, write_trial

from ablate.markers import Context, Monitor
from ablate.records import TrialRecord, read_json, read_rows, write_json
from ablate.training import checkpoint

TIMES = {"time", "step_time_s", "data_time_s", "samples_per_s", "attempt", "eval_time_s"}


def first_step(trial: TrialRecord) -> bool:
    return len(trial.trace()) >= 1


def writing_a_checkpoint(trial: TrialRecord) -> bool:
    return any((trial.folder / "checkpoints").glob(".step-*.tmp"))


def evaluating(trial: TrialRecord) -> bool:
    return (trial.heartbeat(1) or {}).get("phase") == "evaluating"


def last_step(trial: TrialRecord) -> bool:
    return any(row["step"] == 18 for row in trial.trace())


def any_step(trial: TrialRecord) -> bool:
    """After a step that a generator with a fixed seed chose: in the middle of another one."""
    chosen = random.Random(trial.folder.name).randrange(1, 17)
    return any(row["step"] >= chosen for row in trial.trace())


ALL = (first_step, any_step, writing_a_checkpoint, evaluating, last_step)
SETTINGS: dict[str, tuple[int, dict[str, Any], tuple[Callable[[TrialRecord], bool], ...]]] = {
    "fp32": (1, {}, ALL),
    "fp32 of two, loaders": (2, {"batch_size": 8, "workers": 2}, ALL),
    "bf16 accumulated": (
        1,
        {"precision": "amp_bf16", "accum_freq": 2, "batch_size": 8},
        (any_step, writing_a_checkpoint),
    ),
    "scaler of two accumulated": (
        2,
        {"precision": "amp", "batch_size": 4, "accum_freq": 2},
        (evaluating,),
    ),
}


def measured(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Rows by step without what depends on the clock; floats are compared to the last bit."""
    return {
        row["step"]: {k: json.dumps(v) for k, v in row.items() if k not in TIMES} for row in rows
    }


def left_behind(trial: TrialRecord) -> dict[str, Any]:
    """The last checkpoint: hashes of model and optimizer, and its state without clock times."""
    last = sorted((trial.folder / "checkpoints").glob("step-*"))[-1]
    files = read_json(last / "manifest.json")["files"]
    state = read_json(last / "state.json")
    for name in ("train_s", "eval_s"):
        del state["progress"][name]
    for name in ("final", "best"):
        if state["progress"][name]:
            del state["progress"][name]["eval_time_s"]
    return {
        "model": files["model.safetensors"]["sha256"],
        "optimizer": files["optimizer.safetensors"]["sha256"],
        "state": json.dumps(state, sort_keys=True),
    }


def assert_same(trial: TrialRecord, whole: TrialRecord) -> None:
    """Every row of every attempt, every evaluation and the last checkpoint are the same."""
    expected = measured(whole.trace())
    assert measured(trial.trace()) == expected
    for attempt in trial.attempts():
        for step, row in measured(read_rows(trial.attempt_folder(attempt) / "trace.jsonl")).items():
            assert row == expected[step], f"attempt {attempt} replayed step {step} differently"
    assert measured(trial.evaluations()) == measured(whole.evaluations())
    assert left_behind(trial) == left_behind(whole)


def kill(ranks: Ranks) -> None:
    ranks.signal(signal.SIGKILL)
    ranks.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "changes", "moments"), SETTINGS.values(), ids=SETTINGS.keys())
def test_a_killed_run_ends_as_the_run_that_was_not_killed(
    tmp_path: Path,
    data: Path,
    workers: int,
    changes: dict[str, Any],
    moments: tuple[Callable[[TrialRecord], bool], ...],
) -> None:
    """kill -9 at the first step, in steps, while a checkpoint is written, while evaluating, and
    after the last step: all losses bit-equal, all files equal."""
    whole = write_trial(tmp_path / "whole", data, gang=workers, epochs=3, **changes)
    assert run(whole.folder, workers=workers) == [0] * workers
    for moment in moments:
        trial = write_trial(tmp_path / moment.__name__, data, gang=workers, epochs=3, **changes)
        ranks = start(trial.folder, workers=workers)
        try:
            wait_for(lambda t=trial, m=moment: m(t) or t.result(1), moment.__name__)
        finally:
            kill(ranks)
        assert run(trial.folder, workers=workers) == [0] * workers
        assert_same(trial, whole)


def test_damage_costs_time_and_changes_nothing(tmp_path: Path, data: Path) -> None:
    """With its newest checkpoint damaged a trial goes on from the one before, to the same end."""
    whole = write_trial(tmp_path / "whole", data, epochs=3)
    assert run(whole.folder) == [0]
    trial = write_trial(tmp_path / "damaged", data, epochs=3)
    ranks = start(trial.folder)
    wait_for(lambda: (checkpoint.steps(trial.folder / "checkpoints") or [0])[-1] >= 12, "step 12")
    kill(ranks)
    newest = checkpoint.path_of(trial.folder / "checkpoints", 12)
    os.truncate(newest / "optimizer.safetensors", 1000)
    assert run(trial.folder) == [0]
    assert read_rows(trial.attempt_folder(2) / "trace.jsonl")[0]["step"] == 7
    assert (trial.folder / "checkpoints" / "quarantine").exists()
    assert_same(trial, whole)


# ------------------------------------------------------------------- mutation control


@pytest.fixture(scope="module")
def halfway(
    tmp_path_factory: pytest.TempPathFactory, data: Path
) -> tuple[TrialRecord, dict[str, Any]]:
    """A trial folder with a checkpoint after its first epoch of two, and what the end looks like.

    fp16 with a scaler, so that every kind of state is there.
    """
    folder = tmp_path_factory.mktemp("mutations")
    trial = write_trial(folder / "trial", data, precision="amp")
    assert run(trial.folder) == [0]
    end = {"rows": measured(trial.trace()), "evals": measured(trial.evaluations())}
    end["files"] = left_behind(trial)
    shutil.rmtree(checkpoint.path_of(trial.folder / "checkpoints", 12))
    shutil.rmtree(trial.folder / "attempts")
    return trial, end


def resumed(
    halfway: TrialRecord, folder: Path, change: Callable[[dict[str, Any]], None]
) -> tuple[TrialRecord, list[int | None]]:
    """A copy of the trial, its checkpoint changed and signed anew, run to its end."""
    shutil.copytree(halfway.folder, folder)
    path = checkpoint.path_of(folder / "checkpoints", 6)
    snapshot = checkpoint.load(path)
    content = {
        "model": dict(snapshot.model),
        "optimizer": dict(snapshot.optimizer),
        "state": dict(snapshot.state),
    }
    change(content)
    shutil.rmtree(path)
    checkpoint.save(folder / "checkpoints", checkpoint.Snapshot(6, **content))
    trial = TrialRecord(folder)
    return trial, run(folder)


def differs(trial: TrialRecord, end: Mapping[str, Any]) -> bool:
    rows = measured(trial.trace())
    return (
        any(end["rows"].get(step) != row for step, row in rows.items())
        or [step for step in end["rows"] if step > 6] != sorted(rows)
        or measured(trial.evaluations()) != end["evals"]
        or left_behind(trial) != end["files"]
    )


def _reset(kind: str, ending: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        names = [name for name in content[kind] if name.endswith(ending)]
        assert names
        for name in names:
            content[kind][name] = torch.zeros_like(content[kind][name])

    return change


def _forget(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        place = content["state"]
        for name in path[:-1]:
            place[name] = dict(place[name])
            place = place[name]
        assert place[path[-1]] != value
        place[path[-1]] = value

    return change


def _forget_windows(content: dict[str, Any]) -> None:
    state = content["state"]["monitor"]
    fresh = Monitor(context=Context(**state["context"])).state()
    content["state"]["monitor"] = {**state, "rules": fresh["rules"]}


MUTATIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a parameter": _reset("model", "layer2.0.conv2.weight"),
    "logit_scale": _reset("model", "logit_scale"),
    "BatchNorm means": _reset("model", "running_mean"),
    "BatchNorm variances": _reset("model", "running_var"),
    "BatchNorm counters": _reset("model", "num_batches_tracked"),
    "Adam's means": _reset("optimizer", "exp_avg"),
    "Adam's squares": _reset("optimizer", "exp_avg_sq"),
    "Adam's steps": _reset("optimizer", "/step"),
    "the scale": _forget("scaler", "scale", value=1.0),
    "the scaler's counter": _forget("scaler", "_growth_tracker", value=0),
    "the position": _forget("progress", "step", value=5),
    "the pending evaluation": _forget("progress", "evaluated", value=6),
    "the skipped steps": _forget("progress", "skipped", value=7),
    "the substituted samples": _forget("progress", "faults", value=3),
    "the markers' windows": _forget_windows,
}


def test_the_untouched_checkpoint_leads_to_the_same_end(
    tmp_path: Path, halfway: tuple[TrialRecord, dict[str, Any]]
) -> None:
    """The control of the control: signing a checkpoint anew changes nothing."""
    trial, codes = resumed(halfway[0], tmp_path / "t", lambda content: None)
    assert codes == [0]
    assert not differs(trial, halfway[1])


@pytest.mark.parametrize("change", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_leaving_out_any_item_of_the_state_is_noticed(
    tmp_path: Path,
    halfway: tuple[TrialRecord, dict[str, Any]],
    change: Callable[[dict[str, Any]], None],
) -> None:
    """Resuming without one item of the state ends otherwise, or not at all."""
    trial, codes = resumed(halfway[0], tmp_path / "t", change)
    assert codes != [0] or differs(trial, halfway[1])


@pytest.mark.parametrize(
    ("name", "value"), [("trial", "0123456789ab"), ("world_size", 4), ("data", "other")]
)
def test_another_runs_checkpoint_is_refused(
    tmp_path: Path, halfway: tuple[TrialRecord, dict[str, Any]], name: str, value: Any
) -> None:
    """Resume is for the same trial, gang and data; the error says what differs and what to do."""
    trial, codes = resumed(halfway[0], tmp_path / "t", _forget(name, value=value))
    assert codes == [1]
    log = (trial.folder / "log-0.txt").read_text()
    assert f"was written with {name}" in log and "init_from" in log


def test_changed_thresholds_judge_the_trace_anew(
    tmp_path: Path, halfway: tuple[TrialRecord, dict[str, Any]]
) -> None:
    """Markers' thresholds are no part of a trial's identity: a change does not bar resuming."""
    folder = tmp_path / "t"
    shutil.copytree(halfway[0].folder, folder)
    content = read_json(folder / "trial.json")
    content["markers"] = {"loss_spike": {"sigma": 4.5}}
    write_json(folder / "trial.json", content)
    assert run(folder) == [0]
    result = TrialRecord(folder).result(1)
    assert result is not None and result["status"] == "completed"
    assert result["markers"]["thresholds"] == {"loss_spike": {"sigma": 4.5}}


def test_checkpoints_hold_no_code(halfway: tuple[TrialRecord, dict[str, Any]]) -> None:
    """A checkpoint is safetensors and JSON; nothing in it needs unpickling."""
    path = checkpoint.path_of(halfway[0].folder / "checkpoints", 6)
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    assert safetensors.torch.load_file(path / "model.safetensors")
