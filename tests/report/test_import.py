"""Runs that others made become the trials of a study: whoever logged them, the same study."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import optuna
import pyarrow
import pytest
import yaml
from mlflow import MlflowClient
from pyarrow import parquet

import ablate
from ablate.errors import AnalysisError, RecordError
from ablate.records.folder import StudyRecord
from ablate.report.verify import verify
from ablate.runner.agenda import planned

RUNS: list[tuple[float, float, int, list[float]]] = [
    *((1e-3, 0.1, seed, [0.50, 0.60, value]) for seed, value in enumerate((0.712, 0.705, 0.713))),
    (3e-3, 0.1, 0, [0.55, 0.70, 0.780]),
    (1e-3, 0.2, 0, [0.50, math.nan, math.nan]),
]
"""Learning rate, decay, seed, and the accuracy after each of three epochs."""
STEPS = 40
"""Of an epoch; a loss is logged at every tenth."""


def losses(place: int) -> list[tuple[int, float]]:
    """(step, loss) of a run; that of the last run is no number from its second epoch on."""
    lost = place == len(RUNS) - 1
    return [
        (step, math.nan if lost and step > STEPS else 2.3 * math.exp(-step / 60) + 0.1)
        for step in range(10, 3 * STEPS + 1, 10)
    ]


def settings(run: tuple[float, float, int, list[float]]) -> dict[str, float]:
    return {"lr": run[0], "wd": run[1], "seed": run[2], "epochs": 3}


def wandb_csv(folder: Path) -> Path:
    """W&B's export: settings and measurements side by side, a run that has not ended."""
    rows = [
        {"Name": f"run-{k}", "State": "finished", **settings(run), "val_acc": run[3][-1]}
        for k, run in enumerate(RUNS)
    ]
    rows.append({**rows[0], "Name": "now", "State": "running", "val_acc": 0.1})
    path = folder / "export.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def wandb_parquet(folder: Path) -> Path:
    """W&B's API as a table: config and summary are mappings."""
    rows = [
        {
            "name": f"run-{k}",
            "state": "finished",
            "config": json.dumps({"lr": run[0], "wd": {"desc": None, "value": run[1]}}),
            "summary": json.dumps({"val_acc": run[3][-1]}),
        }
        for k, run in enumerate(RUNS)
    ]
    path = folder / "export.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def mlflow_store(folder: Path) -> Path:
    """An SQLite store with the curves, beside an experiment without runs."""
    path = folder / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}")
    experiment = client.create_experiment("resnet", artifact_location=str(folder / "artifacts"))
    for k, run in enumerate(RUNS):
        made = client.create_run(experiment, run_name=f"run-{k}")
        key = made.info.run_id
        for name, value in settings(run).items():
            client.log_param(key, name, value)
        for step, loss in losses(k):
            client.log_metric(key, "train_loss", loss, step=step)
        for epoch, value in enumerate(run[3], start=1):
            client.log_metric(key, "val_acc", value, step=epoch * STEPS)
        client.set_terminated(key)
    return path


def lightning(folder: Path) -> Path:
    """Lightning's CSVLogger: hparams.yaml and metrics.csv in version_N."""
    for k, run in enumerate(RUNS):
        place = folder / "lightning_logs" / f"version_{k}"
        place.mkdir(parents=True)
        (place / "hparams.yaml").write_text(yaml.safe_dump(settings(run)))
        lines = ["epoch,step,train_loss,val_acc"]
        lines += [f"{(step - 1) // STEPS},{step},{loss}," for step, loss in losses(k)]
        lines += [f"{e},{(e + 1) * STEPS},,{value}" for e, value in enumerate(run[3])]
        (place / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder / "lightning_logs"


def timm(folder: Path) -> Path:
    """timm's train.py: args.yaml and summary.csv, a line an epoch."""
    for k, run in enumerate(RUNS):
        place = folder / "output" / f"20261130-1{k}-resnet50"
        place.mkdir(parents=True)
        (place / "args.yaml").write_text(yaml.safe_dump({**settings(run), "output": str(place)}))
        lines = ["epoch,train_loss,eval_loss,val_acc"]
        lines += [f"{e},{1 - e / 5},{1.1 - e / 5},{value}" for e, value in enumerate(run[3])]
        (place / "summary.csv").write_text("\n".join(lines) + "\n")
    return folder / "output"


def trainer(folder: Path) -> Path:
    """Hugging Face's Trainer, in folders that Hydra named."""
    for k, run in enumerate(RUNS):
        place = folder / "hf" / f"lr={run[0]},wd={run[1]},seed={run[2]}" / "checkpoint-120"
        place.mkdir(parents=True)
        history = [{"step": step, "loss": loss, "epoch": step / STEPS} for step, loss in losses(k)]
        history += [{"step": (e + 1) * STEPS, "val_acc": v} for e, v in enumerate(run[3])]
        state = {"log_history": history, "num_train_epochs": 3, "train_batch_size": 32}
        (place / "trainer_state.json").write_text(json.dumps(state))
    return folder / "hf"


def open_clip(folder: Path) -> Path:
    """open_clip_train: params.txt and checkpoints/results.jsonl."""
    for k, run in enumerate(RUNS):
        place = folder / "logs" / f"run-{k}"
        (place / "checkpoints").mkdir(parents=True)
        said = {**settings(run), "name": f"run-{k}", "checkpoint_path": str(place / "checkpoints")}
        lines = (f"{name}: {value}" for name, value in said.items())
        (place / "params.txt").write_text("\n".join(lines))
        lines = (json.dumps({"val_acc": value}) for value in run[3])
        (place / "checkpoints" / "results.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "logs"


def tensorboard(folder: Path) -> Path:
    """Event files, in folders that are called after their settings."""
    from torch.utils.tensorboard import SummaryWriter

    for k, run in enumerate(RUNS):
        with SummaryWriter(str(folder / "tb" / f"lr={run[0]} wd={run[1]} run{k}")) as writer:
            for step, loss in losses(k):
                writer.add_scalar("train/loss", loss, step)
            for epoch, value in enumerate(run[3], start=1):
                writer.add_scalar("val_acc", value, epoch * STEPS)
    return folder / "tb"


def hparams(folder: Path) -> Path:
    """Event files whose settings add_hparams wrote, in folders that say nothing."""
    from torch.utils.tensorboard import SummaryWriter

    for k, run in enumerate(RUNS):
        with SummaryWriter(str(folder / "hp" / f"run{k}")) as writer:
            for epoch, value in enumerate(run[3], start=1):
                writer.add_scalar("val_acc", value, epoch * STEPS)
            writer.add_hparams({"lr": run[0], "wd": run[1]}, {}, run_name="settings")
    return folder / "hp"


MAKERS = [
    wandb_csv, wandb_parquet, mlflow_store, lightning, timm, trainer, open_clip, tensorboard,
    hparams,
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_whoever_logged_them_the_same_runs_are_the_same_study(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    """lr and wd are the factors, the three replicates the baseline, a value that is no number a
    divergence; names of runs, folders and seeds are no factors, and the records are whole."""
    factors = ("lr", "wd") if make is wandb_csv else ()
    run = ablate.import_runs(
        make(tmp_path), metric="val_acc", name="theirs", runs=tmp_path, factors=factors
    )
    table = run.results().sort_values(["lr", "wd", "value"]).reset_index(drop=True)
    assert [factor.name for factor in run.study.factors] == ["lr", "wd"]
    assert run.status().outcomes == {"completed": 4, "diverged": 1} and run.status().waiting == 0
    base = table[(table.lr == "0.001") & (table.wd == "0.1")]
    assert base.value.tolist() == pytest.approx([0.705, 0.712, 0.713], abs=1e-6)
    assert verify(run.record, planned(run.study, run.record), metric="val_acc") == []


@pytest.mark.parametrize("version", ["openclip_2_10_1", "openclip_run"])
def test_three_real_folders_of_open_clip_are_two_seeds_and_a_change(
    tmp_path: Path, version: str
) -> None:
    """A log that 2.10.1 and 3.3.0 wrote, under three names, each with its own places and one with
    another lr: what says where a run was recorded is no setting, so the lr alone is compared, and
    the steps of out.log are there."""
    asset = Path(__file__).parents[1] / "markers" / "assets" / version
    for name, seed, lr in (("first", "0", "0.001"), ("lucky", "1", "0.001"), ("new", "2", "0.01")):
        place = tmp_path / "logs" / name
        shutil.copytree(asset, place)
        text = (place / "params.txt").read_text()
        for key, value in (
            *(("name", name), ("seed", seed), ("lr", lr), ("log_path", f"logs/{name}/out.log")),
            *(("checkpoint_path", f"logs/{name}/checkpoints"), ("report_to", name)),
        ):
            text = re.sub(rf"(?m)^{key}: .*$", f"{key}: {value}", text)
        (place / "params.txt").write_text(text)
    metric = "imagenet-zeroshot-val-top1"
    run = ablate.import_runs(tmp_path / "logs", metric=metric, runs=tmp_path, name="theirs")
    assert [factor.name for factor in run.study.factors] == ["lr"]
    assert run.study.design.name == "observed" and run.status().outcomes == {"completed": 3}
    steps = {len(run.record.record(key).trace()) for key in run.record.trial_ids()}
    assert steps == {8 if version == "openclip_2_10_1" else 30}


def test_curves_are_judged_by_the_markers_and_said_with_cautions(tmp_path: Path) -> None:
    """The loss that is no number is named; the report compares a single run with the spread of
    three, pairs nothing, hands nothing out, and says why on top."""
    run = ablate.import_runs(mlflow_store(tmp_path), metric="val_acc", runs=tmp_path, name="m")
    table = run.results()
    assert table[table.wd == "0.2"].verdict.item() == "NUMERIC_FAIL"
    trial = run.record.record(table[table.wd == "0.2"].trial.item())
    assert any(event["marker"] == "non_finite" for event in trial.events())
    assert [row["val_acc"] for row in trial.evaluations()][0] == 0.5
    written = run.report()
    (question,) = json.loads(written.verdicts_json.read_text())["questions"].values()
    lr = next(c for c in question["contrasts"] if c["factor"] == "lr")
    assert lr["verdict"] == "MATTERS" and "a single run" in lr["method"]
    text = (run.folder / "report.md").read_text()
    assert "no plan gave settings to runs" in text and "hand out no setting" in text
    assert "paired t" not in text and "ablate launch" not in text


def test_a_sweep_without_replicates_is_read_as_a_search(tmp_path: Path) -> None:
    """An Optuna study: numbers drawn from a range are a range, each run its own cell; pruned and
    failed trials keep their ends, and the storage is as it was."""
    url = f"sqlite:///{tmp_path / 'theirs.db'}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=url, study_name="s", direction="minimize",
                                sampler=optuna.samplers.RandomSampler(seed=1))  # fmt: skip

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        depth = trial.suggest_categorical("depth", ["shallow", "deep"])
        trial.report(1.0, step=1)
        if trial.number == 7:
            raise optuna.TrialPruned
        return (math.log10(lr) + 2) ** 2 + (depth == "deep") / 10

    study.optimize(objective, n_trials=16)
    before = (tmp_path / "theirs.db").read_bytes()
    run = ablate.import_runs(tmp_path / "theirs.db", metric="value", minimize=True, runs=tmp_path)
    assert (tmp_path / "theirs.db").read_bytes() == before
    assert run.study.design.name == "search" and run.study.factor("lr").range is not None
    assert run.status().outcomes == {"completed": 15, "pruned": 1}
    found = json.loads(run.report().verdicts_json.read_text())["search"]
    assert {row["factor"] for row in found["factors"]} == {"lr", "depth"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metric": "val_ac"}, "did you mean 'val_acc'"),
        ({"factors": ["lr", "wdd"]}, "has no column wdd"),
        ({"factors": []}, "does not say which columns are settings"),
        ({"factors": ["epochs"]}, "no setting of that name differs"),
        ({"baseline": {"lr": "0.002"}}, "--baseline lr=0.002"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_there(
    tmp_path: Path, options: Mapping[str, object], says: str
) -> None:
    """A metric, column or level that is not there is told with those that are; nothing is left."""
    given = {"metric": "val_acc", "factors": ["lr", "wd"], **options}
    with pytest.raises(AnalysisError, match=says):
        ablate.import_runs(wandb_csv(tmp_path), runs=tmp_path / "runs", **given)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("cell", ["50.1%", "50.1 +- 0.4", "1,250.5", "failed", "true"])
def test_a_result_that_is_text_is_no_run_without_one(tmp_path: Path, cell: str) -> None:
    """It is refused with its row; what says that nothing was measured is a run that failed."""
    for said in (cell, "n/a"):
        (tmp_path / "t.csv").write_text(f'lr,acc\n0.1,50\n0.2,"{said}"\n0.3,51\n')
        ask = partial(ablate.import_runs, tmp_path / "t.csv", metric="acc", runs=tmp_path / "runs")
        if said == cell:
            with pytest.raises(AnalysisError, match=f"acc is {re.escape(repr(cell))} in row 2"):
                ask(factors=["lr"])
            with pytest.raises(AnalysisError, match="name each of them: --factor lr"):
                ask()
    assert ask(factors=["lr"]).status().outcomes == {"completed": 2, "failed": 1}


def test_a_study_is_not_overwritten(tmp_path: Path) -> None:
    """The second import of a name is refused, and the first is whole."""
    about = {"metric": "val_acc", "factors": ["lr"], "runs": tmp_path, "name": "twice"}
    ablate.import_runs(wandb_csv(tmp_path), **about)
    with pytest.raises(RecordError, match="--name"):
        ablate.import_runs(wandb_csv(tmp_path), **about)
    assert len(StudyRecord(tmp_path / "twice").trial_ids()) == len(RUNS)
