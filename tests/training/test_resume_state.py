"""What a checkpoint holds: leaving out any item is noticed, another run's is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from interruptions import SMALL, left_behind, measured
from small_trials import add_models, log_of, run, write_trial

from ablate.markers import Context, Monitor
from ablate.recipes.openclip import Config
from ablate.records.files import read_json, write_json
from ablate.records.folder import TrialRecord
from ablate.training import checkpoint
from ablate.trial.recipe import Role, fields_of

FROM = 6
"""The checkpoint that mutated runs resume from: one epoch of two steps before the end."""


class Halfway(NamedTuple):
    """A run with all its checkpoints, whose last epoch is to be run again."""

    trial: TrialRecord
    end: Mapping[str, Any]


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Halfway:
    """4 epochs of 2 steps, evaluated after the 2nd and 4th, with every kind of state there is.

    A gradient scaler, markers that have already told of something, a best evaluation.
    """
    fields = {**SMALL, "train_num_samples": 32, "epochs": 4, "zeroshot_frequency": 2}
    folder = tmp_path_factory.mktemp("mutations") / "trial"
    told = {"logit_scale": {"jump": 1e-6, "jump_steps": 1}}
    fields |= {"batch_size": 16, "precision": "amp", "keep_every": 1}
    trial = write_trial(folder, data, markers=told, **fields)
    assert run(trial.folder) == [0], log_of(trial)
    end = {"rows": measured(trial.trace()), "evals": measured(trial.evaluations())}
    end["files"] = left_behind(trial)
    end["markers"] = trial.result(1)["markers"]  # type: ignore[index]
    end["train_s"] = checkpoint.load(path_in(trial, FROM)).state["progress"]["train_s"]
    return Halfway(trial, end)


def path_in(trial: TrialRecord, step: int) -> Path:
    return checkpoint.path_of(trial.folder / "checkpoints", step)


def resumed(
    halfway: Halfway, folder: Path, change: Callable[[dict[str, Any]], None], *, step: int = FROM
) -> tuple[TrialRecord, list[int | None]]:
    """A copy of the trial, its checkpoint of `step` changed and signed anew, run to its end."""
    shutil.copytree(halfway.trial.folder, folder)
    trial = TrialRecord(folder)
    shutil.rmtree(folder / "attempts")
    for later in range(step + 1, 9):
        shutil.rmtree(path_in(trial, later), ignore_errors=True)
    snapshot = checkpoint.load(path_in(trial, step))
    content = {
        "model": dict(snapshot.model),
        "optimizer": dict(snapshot.optimizer),
        "state": dict(snapshot.state),
    }
    change(content)
    shutil.rmtree(path_in(trial, step))
    checkpoint.save(folder / "checkpoints", checkpoint.Snapshot(step, **content))
    return trial, run(folder)


def differs(trial: TrialRecord, end: Mapping[str, Any], *, step: int = FROM) -> bool:
    rows, result = measured(trial.trace()), trial.result(1)
    assert result is not None
    return (
        any(end["rows"].get(number) != row for number, row in rows.items())
        or [number for number in end["rows"] if number > step] != sorted(rows)
        or measured(trial.evaluations())
        != {number: row for number, row in end["evals"].items() if number >= step}
        or left_behind(trial) != end["files"]
        or result["markers"] != end["markers"]
        or result["train_s"] < end["train_s"]
    )


def listed(snapshot: checkpoint.Snapshot, buffers: set[str]) -> set[str]:
    """Every item of state in a checkpoint, as it lists them itself; tensors by their kind."""
    items = set()
    for name in snapshot.model:
        kind = name.rpartition(".")[2] if name in buffers else "parameter"
        items.add(f"model/{'logit_scale' if name == 'logit_scale' else kind}")
    items |= {f"optimizer/{name.rpartition('/')[2]}" for name in snapshot.optimizer}
    for name, value in snapshot.state.items():
        deeper = isinstance(value, dict) and name in ("progress", "scaler", "monitor")
        items |= {f"{name}/{part}" for part in value} if deeper else {name}
    return items


Change = Callable[[dict[str, Any]], None]


def _zeros(kind: str, ending: str) -> Change:
    """Tensors as they are before the first step, or at least without their past."""

    def change(content: dict[str, Any]) -> None:
        names = [name for name in content[kind] if name.endswith(ending)]
        assert names and any(bool(content[kind][name].any()) for name in names)
        for name in names:
            content[kind][name] = torch.zeros_like(content[kind][name])

    return change


def _forget(*path: str, value: Any) -> Change:
    """The state's item at `path` as a run without it would have it."""

    def change(content: dict[str, Any]) -> None:
        place = content["state"]
        for name in path[:-1]:
            place[name] = dict(place[name])
            place = place[name]
        assert place[path[-1]] != value, "nothing to leave out"
        place[path[-1]] = value

    return change


def _forget_rules(content: dict[str, Any]) -> None:
    state = content["state"]["monitor"]
    fresh = Monitor(context=Context(**state["context"])).state()
    assert fresh["rules"] != state["rules"]
    content["state"]["monitor"] = {**state, "rules": fresh["rules"]}


STOP = {"marker": "non_finite", "step": 3}


MUTATIONS: dict[str, Change] = {
    "model/parameter": _zeros("model", "layer2.0.conv2.weight"),
    "model/logit_scale": _zeros("model", "logit_scale"),
    "model/running_mean": _zeros("model", "running_mean"),
    "model/running_var": _zeros("model", "running_var"),
    "model/num_batches_tracked": _zeros("model", "num_batches_tracked"),
    "optimizer/exp_avg": _zeros("optimizer", "exp_avg"),
    "optimizer/exp_avg_sq": _zeros("optimizer", "exp_avg_sq"),
    "optimizer/step": _zeros("optimizer", "/step"),
    "scaler/scale": _forget("scaler", "scale", value=1.0),
    "scaler/growth_factor": _forget("scaler", "growth_factor", value=3.0),
    "scaler/backoff_factor": _forget("scaler", "backoff_factor", value=0.25),
    "scaler/growth_interval": _forget("scaler", "growth_interval", value=1),
    "scaler/_growth_tracker": _forget("scaler", "_growth_tracker", value=0),
    "progress/step": _forget("progress", "step", value=5),
    "progress/scale": _forget("progress", "scale", value=2.0**17),
    "progress/skipped": _forget("progress", "skipped", value=7),
    "progress/faults": _forget("progress", "faults", value=3),
    "progress/final": _forget("progress", "final", value=None),
    "progress/best": _forget("progress", "best", value=None),
    "progress/train_s": _forget("progress", "train_s", value=-1e6),
    "monitor/rules": _forget_rules,
    "monitor/events": _forget("monitor", "events", value=[]),
    "monitor/stop": _forget("monitor", "stop", value=STOP),
    "monitor/seen": _forget("monitor", "seen", value=[]),
}
"""For each item of the state: what a checkpoint without it would hold."""

REFUSED = {
    "trial": "0123456789ab",
    "world_size": 4,
    "data": "other",
    "parameter_groups": "0123456789ab",
    "config": {"lr": 1.0},
}
"""Items that are compared, not restored: another value is refused."""

NOT_STATE = {
    "format": "in the manifest too, where it is compared",
    "step": "the checkpoint's name; the loop goes by progress/step",
    "versions": "only told in the certificate",
    "ranks": "only told in the certificate: others may do the same work",
    "progress/evaluated": "has a test of its own, from a checkpoint that was evaluated",
    "progress/eval_s": "a time; nothing follows from it",
    "zero_gradients": "all 0 here; test_loop resumes a model with a layer that nothing uses",
    "optimizer_numbers": "empty: AdamW has none",
    "monitor/step": "every row brings its own, and a resumed run has at least one to come",
    "monitor/version": "another one has the trace judged anew",
    "monitor/thresholds": "other ones have the trace judged anew",
    "monitor/context": "another one has the trace judged anew",
}


def test_every_item_of_the_state_has_its_mutation(halfway: Halfway) -> None:
    """A checkpoint lists its items itself: a new one without a mutation here fails this test."""
    from open_clip import create_model

    add_models()
    buffers = {name for name, _ in create_model("tiny-test-rn").named_buffers()}
    snapshot = checkpoint.load(path_in(halfway.trial, FROM))
    assert snapshot.state["optimizer_numbers"] == {}
    assert listed(snapshot, buffers) == {*MUTATIONS, *REFUSED, *NOT_STATE}


def test_the_untouched_checkpoint_leads_to_the_same_end(tmp_path: Path, halfway: Halfway) -> None:
    """The control of the control: signing a checkpoint anew changes nothing."""
    trial, codes = resumed(halfway, tmp_path / "t", lambda content: None)
    assert codes == [0], log_of(trial)
    assert not differs(trial, halfway.end)


def _each() -> list[Any]:
    """The first of every part in the suite, all on demand."""
    firsts = {name.partition("/")[0]: name for name in reversed(MUTATIONS)}.values()
    return [
        pytest.param(change, id=name, marks=[] if name in firsts else pytest.mark.exhaustive)
        for name, change in MUTATIONS.items()
    ]


@pytest.mark.parametrize("change", _each())
def test_leaving_out_any_item_of_the_state_is_noticed(
    tmp_path: Path, halfway: Halfway, change: Change
) -> None:
    """Resuming without one item of the state ends otherwise, or not at all."""
    trial, codes = resumed(halfway, tmp_path / "t", change)
    assert codes != [0] or differs(trial, halfway.end)


@pytest.mark.parametrize("evaluated", [True, False])
def test_an_evaluation_is_made_once(tmp_path: Path, halfway: Halfway, evaluated: bool) -> None:
    """A checkpoint comes before its evaluation: resumed from, it is evaluated, unless it was."""
    change = _forget("progress", "evaluated", value=4) if evaluated else lambda content: None
    trial, codes = resumed(halfway, tmp_path / "t", change, step=4)
    assert codes == [0], log_of(trial)
    assert differs(trial, halfway.end, step=4) == evaluated
    assert [row["step"] for row in trial.evaluations()] == ([8] if evaluated else [4, 8])


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=REFUSED.keys())
def test_another_runs_checkpoint_is_refused(
    tmp_path: Path, halfway: Halfway, name: str, value: Any
) -> None:
    """Resume is for the same trial, gang, data and configuration; the error says what differs,
    what may differ, and what to do."""
    trial, codes = resumed(halfway, tmp_path / "t", _forget(name, value=value))
    assert codes == [1]
    log = (trial.folder / "log-0.txt").read_text()
    said = "lr 1.0, and this run has 0.001" if name == "config" else f"{name} {value!r}"
    assert f"was written with {said}" in log and "init_from" in log
    assert f"(only {', '.join(sorted(fields_of(Config, Role.FREE)))} may differ)" in log


def test_what_may_differ_does_and_the_certificate_tells(tmp_path: Path, halfway: Halfway) -> None:
    """Each field of the written list can be changed in a running trial; the rest is restored."""
    config = halfway.trial.trial()["config"]
    others = {name: f"not {config[name]}" for name in sorted(fields_of(Config, Role.FREE))}

    def change(content: dict[str, Any]) -> None:
        content["state"]["config"] = {**content["state"]["config"], **others}
        content["state"]["versions"] |= {"timm": "0.9.1", "processor": "NVIDIA A100"}

    trial, codes = resumed(halfway, tmp_path / "t", change)
    assert codes == [0], log_of(trial)
    assert not differs(trial, halfway.end)
    certificate = read_json(trial.attempt_folder(1) / "resumed.json")
    assert certificate["step"] == FROM and certificate["steps_total"] == 8
    assert certificate["changed"] == {name: [others[name], config[name]] for name in others}
    assert {name: then for name, (then, _) in certificate["versions"].items()} == {
        "timm": "0.9.1", "processor": "NVIDIA A100"
    }  # fmt: skip
    assert {"workers", "cache_gib", "checkpoint_frequency", "keep_every"} <= set(others)
    assert set(certificate["sha256"]) == {
        "model.safetensors", "optimizer.safetensors", "state.json"
    }  # fmt: skip
    log = (trial.folder / "log-0.txt").read_text()
    for words in (
        "resumed at step 6 of 8",
        "gradient scaler, ",
        "workers: 'not 0', now 0",
        "timm 0.9.1, now ",
        "processor NVIDIA A100, now cpu",
    ):
        assert words in log


def test_changed_thresholds_judge_the_trace_anew(tmp_path: Path, halfway: Halfway) -> None:
    """Markers' thresholds are no part of a trial's identity: a change does not bar resuming."""
    folder = tmp_path / "t"
    shutil.copytree(halfway.trial.folder, folder)
    shutil.rmtree(path_in(TrialRecord(folder), 8))
    content = read_json(folder / "trial.json")
    content["markers"] = {"loss_spike": {"sigma": 4.5}}
    write_json(folder / "trial.json", content)
    assert run(folder) == [0]
    result = TrialRecord(folder).result(2)
    assert result is not None and result["status"] == "completed"
    assert result["markers"]["thresholds"] == {"loss_spike": {"sigma": 4.5}}


def test_checkpoints_hold_no_code(halfway: Halfway) -> None:
    """A checkpoint is safetensors and JSON; nothing in it needs unpickling."""
    path = path_in(halfway.trial, FROM)
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    assert safetensors.torch.load_file(path / "model.safetensors")
