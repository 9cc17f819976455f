"""A study through the command line: real data, real DDP, real Ray, real MLflow, real Optuna."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow.tracking import MlflowClient

from ablate.records.folder import StudyRecord

STUDY = """\
name: small
recipe: openclip
baseline:
  model: tiny-rn-a
  train_data: data/emoji/train/{00000..00007}.tar
  train_num_samples: 512
  imagenet_val: data/emoji/val
  zeroshot_frequency: 1
  precision: fp32
  batch_size: 64
  warmup: 2
  epochs: 2
  workers: 0
factors:
  beta2: [0.999, 0.98]
  contrastive_loss:
    default: {}
    local_gather: {local_loss: true, gather_with_grad: true}
controls: {contrastive_loss: [local_gather]}
seeds: [0]
gang: {workers: 2}
"""


def ablate(folder: Path, *arguments: str, timeout_s: float = 800) -> str:
    """Run the command line in `folder`; its output, or a failure with all it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "ablate.cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of three trials, launched with Ray."""
    made = tmp_path_factory.mktemp("study")
    (made / "small.yaml").write_text(STUDY)
    ablate(made, "data", "emoji")
    ablate(made, "launch", "small.yaml", "--yes")
    return made


@pytest.mark.slow
def test_a_study_ends_with_an_outcome_for_every_trial(folder: Path) -> None:
    """Three trials of two processes complete, with a row per step and a zero-shot per epoch."""
    records = list(StudyRecord(folder / "runs" / "small").records())
    assert len(records) == 3
    for record in records:
        outcome = record.outcome()
        assert outcome is not None and outcome["outcome"] == "completed"
        assert [row["step"] for row in record.trace()] == list(range(1, 9))
        assert [row["epoch"] for row in record.evaluations()] == [1, 2]
        assert 0 <= outcome["value"] <= 1


@pytest.mark.slow
def test_launching_again_does_nothing(folder: Path) -> None:
    """A second launch of a finished study starts no attempt and ends at once."""
    before = sorted((folder / "runs" / "small" / "trials").glob("*/attempts/*"))
    said = ablate(folder, "launch", "small.yaml", "--yes")
    assert "3 of 3 ended" in said
    assert sorted((folder / "runs" / "small" / "trials").glob("*/attempts/*")) == before


@pytest.mark.slow
def test_mlflow_holds_study_cells_and_trials(folder: Path) -> None:
    """One experiment; side by side a run for the study, one for each setting and one for each
    seed, with its curves; a trial has 25 keys at most and no parameter without a value."""
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    kinds = [run.data.tags["kind"] for run in runs]
    assert sorted(kinds) == ["cell"] * 3 + ["study"] + ["trial"] * 3
    for run in runs:
        if run.data.tags["kind"] != "trial":
            continue
        assert run.data.params["model"] == "tiny-rn-a"
        assert not {"null", "", "None"} & set(run.data.params.values())
        assert run.data.tags["outcome"] == "completed"
        assert len(run.data.metrics) <= 25, sorted(run.data.metrics)
        assert {key.split("/")[0] for key in run.data.metrics if "/" in key} == {
            "eval", "stability", "system", "train"
        }  # fmt: skip
        history = client.get_metric_history
        assert len(history(run.info.run_id, "train/loss")) == 8
        assert len(history(run.info.run_id, "eval/imagenet_top1_pct")) == 2


@pytest.mark.slow
def test_optuna_holds_every_cell(folder: Path) -> None:
    """The storage opens in Optuna and has a completed trial for each of the three cells."""
    storage = f"sqlite:///{folder / 'runs' / 'small' / 'optuna.db'}"
    [name] = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 3


@pytest.mark.slow
def test_status_report_and_rebuild_work_from_the_folder(folder: Path) -> None:
    """Every verb that reads a study works on the folder alone, and says JSON where asked."""
    status = json.loads(ablate(folder, "status", "runs/small", "--json"))
    assert (status["outcomes"], status["controller"]) == ({"completed": 3}, "absent")
    verdicts = json.loads(ablate(folder, "report", "runs/small", "--json"))
    assert verdicts
    page = (folder / "runs" / "small" / "report.html").read_text()
    assert "beta2" in page and "contrastive_loss" in page
    assert "Rebuilt" in ablate(folder, "rebuild", "runs/small")
    test_mlflow_holds_study_cells_and_trials(folder)


@pytest.mark.slow
def test_the_best_setting_is_exported_as_a_command_and_a_model(folder: Path) -> None:
    """train.sh holds every resolved value, and the model loads in open_clip."""
    import open_clip

    ablate(folder, "export", "runs/small", "--cell", "baseline")
    best = folder / "runs" / "small" / "best"
    words = shlex.split((best / "train.sh").read_text(), comments=True)
    assert words[words.index("--batch-size") + 1] == "64"
    assert {"--beta2", "--precision", "--lr", "--warmup", "--seed"} <= set(words)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{best / 'model'}")
    assert sum(p.numel() for p in model.parameters()) > 4_000_000


@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_launch_that_is_stopped_or_killed_goes_on(
    folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """After Ctrl-C or SIGKILL no process is left, and the next launch ends the same trials.

    After Ctrl-C the second attempt starts from the checkpoint that the first left.
    """
    (tmp_path / "data").symlink_to(folder / "data")
    text = STUDY.replace("epochs: 2", "epochs: 6").replace("  beta2: [0.999, 0.98]\n", "")
    (tmp_path / "small.yaml").write_text(text)
    controller = subprocess.Popen(
        [sys.executable, "-m", "ablate.cli", "launch", "small.yaml", "--yes"],
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        wait_for(lambda: last_step(tmp_path) >= 6, controller)
        tree = psutil.Process(controller.pid).children(recursive=True)
        controller.send_signal(number)
        assert controller.wait(timeout=180) == code
    finally:
        controller.kill()
        controller.wait()
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert tree and alive == []
    ablate(tmp_path, "launch", "small.yaml", "--yes")
    for record in StudyRecord(tmp_path / "runs" / "small").records():
        outcome = record.outcome()
        assert outcome is not None and outcome["outcome"] == "completed"
        assert [row["step"] for row in record.trace()] == list(range(1, 25))
        if number == signal.SIGINT and len(record.attempts()) == 2:
            first = record.first_row(2)
            assert first is not None and first["step"] == record.last_step(1) + 1


def last_step(folder: Path) -> int:
    """The furthest step that any trial of the study has recorded."""
    records = StudyRecord(folder / "runs" / "small").records()
    return max((r.last_step(n) for r in records for n in r.attempts()), default=0)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "the launch ended by itself"
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_wrong_folder_or_file_ends_in_a_message(folder: Path) -> None:
    """A mistyped run or study gives exit code 2 and a message without a traceback."""
    for arguments in (["status", "runs/smal"], ["check", "smal.yaml"]):
        done = subprocess.run(
            [sys.executable, "-m", "ablate.cli", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert "small" in done.stderr and "Traceback" not in done.stderr
