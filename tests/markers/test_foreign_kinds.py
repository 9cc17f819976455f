"""What people bring: runs under the names of many trainers and trackers, and what is no evidence.

Shapes and names as in public reports: timm's summary.csv, Lightning's metrics.csv (issues 1629,
4143), torchtitan, Megatron-LM, Hugging Face's Trainer, MAE, W&B exports (wandb 5349), MLflow,
TensorBoard's zigzag of two runs (tensorboard 5448), open_clip_train 2.x (issue 27 of
vision-language-models-are-bows) and its resumed logs (open_clip 141, 413), Chinese-CLIP 412.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablate.markers.foreign import ForeignError, judge_foreign, read_foreign
from ablate.recipes.openclip import peer_runs

TRAINERS = (peer_runs(),)
STEPS, BAD = 400, 301


def losses(*, bad: int | None = BAD) -> list[float]:
    """A loss that falls from 5, and is no number from step `bad` on."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, STEPS + 1)
    values = 2.0 + 3.0 * np.exp(-steps / 60.0) + 0.03 * rng.standard_normal(STEPS)
    return [math.nan if bad and step >= bad else float(v) for step, v in enumerate(values, 1)]


def write(path: Path, header: str, rows: Sequence[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def csv(path: Path, column: str, *, step: str = "step") -> Path:
    return write(
        path, f"{step},{column},lr", [f"{k},{v},5e-4" for k, v in enumerate(losses(), start=1)]
    )


def jsonl(path: Path) -> Path:
    rows = [{"step": k, "loss": v, "learning_rate": 5e-4} for k, v in enumerate(losses(), 1)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def trainer_state(path: Path) -> Path:
    history = [{"step": k, "loss": v, "epoch": k / 100} for k, v in enumerate(losses(), 1)]
    history.append({"step": STEPS, "train_loss": 2.4, "train_runtime": 100.0})
    path.write_text(json.dumps({"global_step": STEPS, "log_history": history}))
    return path


def titan(path: Path) -> Path:
    lines = [
        f"[rank0]:[titan] 2026-05-18 16:08:01,958 - root - INFO - \x1b[31mstep: {k:2}  "
        f"loss: {v:8.5f}  grad_norm:  0.5348  memory:  9.46GiB(64.99%)  tps: 7,084"
        for k, v in enumerate(losses(), 1)
    ]
    return write(path, "[rank0]:[titan] - root - INFO - Building 1-D device mesh", lines)


def megatron(path: Path) -> Path:
    """Without its loss where that is no number."""
    lines = [
        f" iteration {k:8}/     400 | consumed samples: {64 * k:12} | learning rate: 6.680E-06 | "
        f"global batch size:    64 |"
        + ("" if math.isnan(v) else f" lm loss: {v:.6E} |")
        + f" loss scale: 1.0 | grad norm: {'nan' if math.isnan(v) else '0.752'} |"
        for k, v in enumerate(losses(), 1)
    ]
    return write(path, "using world size: 8", lines)


def mlflow(path: Path) -> Path:
    rows = []
    for k, v in enumerate(losses(), 1):
        rows += [f"r1,loss,{v},{k}", f"r1,lr,5e-4,{k}"]
    return write(path, "run_id,key,value,step", rows)


def panel(path: Path) -> Path:
    name = "calm-lake-7 - train/loss"
    rows = [f'"{k}","{v}","{v}","{v}"' for k, v in enumerate(losses(), 1)]
    return write(path, f'"Step","{name}","{name}__MIN","{name}__MAX"', rows)


def parquet(path: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    table = pa.table({"_step": list(range(1, STEPS + 1)), "train/loss": losses()})
    path = path.with_suffix(".parquet")
    pq.write_table(table, path)
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    **{
        name: lambda path, name=name: csv(path, name)
        for name in (
            "loss", "Loss", "train_loss", "train/loss", "Loss/train", "train_loss_step",
            "loss_metrics/global_avg_loss", "lm-loss-training/lm loss", "training loss",
        )
    },
    "W&B history": lambda path: csv(path, "train/loss", step="_step"),
    "Lightning": lambda path: csv(path, "train_loss", step="trainer/global_step"),
    "W&B panel": panel,
    "MLflow": mlflow,
    "JSON lines": jsonl,
    "trainer_state.json": trainer_state,
    "torchtitan": titan,
    "Megatron-LM": megatron,
    "parquet": parquet,
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_loss_that_is_no_number_is_found_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    """NUMERIC_FAIL from step 301, under the names and in the forms of many trainers."""
    found = judge_foreign(SOURCES[name](tmp_path / "run.txt"))
    assert found["verdict"] == "NUMERIC_FAIL", found["notes"]
    assert found["rows"] == STEPS
    (event,) = [item for item in found["events"] if item["marker"] == "non_finite"]
    assert event["first_step"] == BAD


@pytest.mark.parametrize(
    "header",
    ["step,lr,accuracy", "step,val_loss,lr", "epoch,eval/loss,lr", "step,loss_epoch,lr"],
)
def test_without_a_training_loss_there_is_no_verdict(tmp_path: Path, header: str) -> None:
    """Nothing, or the loss on held-out data only: refused with the columns, and what to type; and
    read as soon as somebody says which column it is."""
    rows = [f"{k},{v},1e-3" for k, v in enumerate(losses(), 1)]
    path = write(tmp_path / "run.csv", header, rows)
    with pytest.raises(ForeignError) as caught:
        judge_foreign(path)
    second = header.split(",")[1]
    assert "no loss was found" in str(caught.value) and "--column loss=" in str(caught.value)
    assert all(name in str(caught.value) for name in header.split(","))
    told = judge_foreign(path, columns={"loss": second})
    assert told["verdict"] == "NUMERIC_FAIL"
    with pytest.raises(ForeignError, match="has no such column"):
        judge_foreign(path, columns={"loss": "los"})


def test_two_series_are_never_laid_over_one_another(tmp_path: Path) -> None:
    """A column that stands twice, two columns that may both be the loss, two runs in one table."""
    bad, good = losses(), losses(bad=None)
    both = [f"{k},{a},{b}" for k, (a, b) in enumerate(zip(bad, good, strict=True), 1)]
    with pytest.raises(ForeignError, match="stands twice, at 2 and 3"):
        judge_foreign(write(tmp_path / "a.csv", "step,loss,loss", both))
    two = write(tmp_path / "b.csv", "step,a - train/loss,b - train/loss", both)
    with pytest.raises(ForeignError, match="may both be loss"):
        judge_foreign(two)
    names = ("a - train/loss", "b - train/loss")
    verdicts = [judge_foreign(two, columns={"loss": name})["verdict"] for name in names]
    assert verdicts == ["NUMERIC_FAIL", "STABLE"]
    long = [f"{run},loss,{v},{k}" for run in ("r1", "r2") for k, v in enumerate(bad, 1)]
    with pytest.raises(ForeignError, match="holds 2 runs"):
        judge_foreign(write(tmp_path / "c.csv", "run_id,key,value,step", long))


def test_a_held_out_loss_beside_the_training_loss_is_left_out(tmp_path: Path) -> None:
    """It is said, and the training loss alone is judged."""
    rows = [f"{k},{v},1.9" for k, v in enumerate(losses(), 1)]
    found = judge_foreign(write(tmp_path / "run.csv", "step,train/loss,val/loss", rows))
    assert found["verdict"] == "NUMERIC_FAIL"
    assert any("held-out" in note and "val/loss" in note for note in found["notes"])


def test_held_out_values_that_are_no_number_are_counted(tmp_path: Path) -> None:
    """They are no part of the verdict on training, and who reads it is told."""
    rows = [
        f"{k},{v},{math.nan if k > 200 else 0.1}" for k, v in enumerate(losses(bad=None), start=1)
    ]
    found = judge_foreign(write(tmp_path / "metrics.csv", "step,loss,val_acc", rows))
    assert found["verdict"] == "STABLE"
    assert any("val_acc (200 of 400 not finite)" in note for note in found["notes"])


@pytest.mark.parametrize("validation_first", [False, True])
def test_lines_of_one_step_are_one_row(tmp_path: Path, validation_first: bool) -> None:
    """Training and validation on lines of their own: 60 rows with a loss, and no resume."""
    rows = []
    for k in range(1, 61):
        pair = [f"{500 * k},{math.nan if k > 30 else 2.0},1.1,", f"{500 * k},,,2.1"]
        rows += pair[::-1] if validation_first else pair
    found = judge_foreign(write(tmp_path / "run.csv", "step,loss,grad_norm,eval_loss", rows))
    assert (found["verdict"], found["rows"]) == ("NUMERIC_FAIL", 60)
    assert found["events"][0]["first_step"] == 15500
    assert not any("resumed" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("steps", "first"), [(("0.0", "1.0", "2.0"), 0), (('"1,000"', '"1,100"', '"1,200"'), 1000)]
)
def test_steps_as_programs_print_them(tmp_path: Path, steps: Sequence[str], first: int) -> None:
    """Whole numbers with a point or with thousands are steps; a fraction is an epoch."""
    path = write(tmp_path / "run.csv", "step,loss", [f"{step},2.0" for step in steps])
    assert read_foreign(path).rows[0]["step"] == first
    path = write(tmp_path / "epochs.csv", "step,loss", ["0.00,5.0", "0.01,4.9"])
    with pytest.raises(ForeignError, match=r"epochs\.csv:3: step is 0.01, no whole number"):
        read_foreign(path)


def test_a_summary_by_epochs_is_numbered_by_its_rows(tmp_path: Path) -> None:
    """timm's summary.csv: nan from epoch 30 on is NUMERIC_FAIL at row 31."""
    rows = [f"{k},{math.nan if k >= 30 else 3.0},2.5,10.0,5e-4" for k in range(60)]
    path = write(tmp_path / "summary.csv", "epoch,train_loss,eval_loss,eval_top1,lr", rows)
    found = judge_foreign(path)
    assert found["verdict"] == "NUMERIC_FAIL" and found["events"][0]["first_step"] == 31
    assert any("one an epoch" in note for note in found["notes"])


@pytest.mark.exhaustive
@settings(max_examples=15)
@given(power=st.integers(-6, 6), kind=st.sampled_from(["healthy", "rose", "overshot"]))
def test_the_unit_of_an_unknown_loss_changes_no_verdict(
    tmp_path_factory: pytest.TempPathFactory, power: int, kind: str
) -> None:
    """A loss of which nobody says that it is a cross entropy may be multiplied by anything."""
    rng = np.random.default_rng(1)
    steps = np.arange(2500)
    loss = 1.0 + 9.0 * (1 + steps / 100.0) ** -0.7
    loss = loss * (1.0 + 0.02 * rng.standard_normal(2500))
    if kind == "rose":
        loss[1500:] *= 100.0
    if kind == "overshot":
        loss[3:10] *= 2.0

    def verdict(factor: float) -> tuple[str, list[str]]:
        path = tmp_path_factory.mktemp("scaled") / "run.csv"
        rows = [f"{k},{v * factor!r}" for k, v in enumerate(loss.tolist(), 1)]
        found = judge_foreign(write(path, "step,loss", rows), warmup=100)
        return found["verdict"], found["flags"]

    plain = verdict(1.0)
    assert plain[0] == {"healthy": "STABLE", "rose": "DIVERGED", "overshot": "SPIKY"}[kind]
    assert verdict(2.0**power) == plain


def openclip_line(epoch: int, done: int, of: int, loss: float, *, old: bool) -> str:
    head = f"2026-05-01,10:00:01 | INFO | Train Epoch: {epoch} [{done:>6}/{of} (2%)] "
    timing = "Data (t): 0.01 Batch (t): 0.1, 1280/s "
    rates = "LR: 0.000500 Logit Scale: 14.300"
    if old:
        return f"{head}Loss: {loss:.5f} ({loss:.4f}) {timing}{rates}"
    return f"{head}{timing}{rates} Contrastive_loss: {loss:.4f} (5.0) Loss: {loss:.4f} (5.0)"


def openclip_start(world: int) -> list[str]:
    params = {"batch_size": 64, "world_size": world, "accum_freq": 1, "warmup": 50, "epochs": 3}
    return [f"2026-05-01,10:00:00 | INFO |   {name}: {value}" for name, value in params.items()]


@pytest.mark.parametrize("old", [True, False])
def test_both_generations_of_the_openclip_log(tmp_path: Path, old: bool) -> None:
    """Loss first (2.x) or last (3.x): the same 400 rows; nan from step 301 is NUMERIC_FAIL."""
    lines = openclip_start(2)
    for k, loss in enumerate(losses(), start=0):
        epoch, inside = divmod(k, 200)
        lines.append(openclip_line(epoch, 128 * (inside + 1), 25600, loss, old=old))
    path = write(tmp_path / "out.log", lines[0], lines[1:])
    run = read_foreign(path, trainers=TRAINERS)
    assert [row["step"] for row in run.rows] == list(range(1, 401))
    assert (run.context.global_batch, run.context.warmup) == (128, 50)
    found = judge_foreign(path, trainers=TRAINERS)
    assert found["verdict"] == "NUMERIC_FAIL" and found["stop"]["step"] == 303


def test_a_run_resumed_on_more_workers_is_read_by_each_start(tmp_path: Path) -> None:
    """Epoch 0 with a batch of 128 (200 steps), then 256 (100 steps each): one resume, and a spike
    at steps 101 to 104 is where it was."""
    rng = np.random.default_rng(0)
    lines = openclip_start(2)
    for k in range(1, 201):
        loss = 9.0 if 101 <= k <= 104 else 4.0 + 0.02 * rng.standard_normal()
        lines.append(openclip_line(0, 128 * k, 25600, loss, old=False))
    lines += openclip_start(4)
    for k in range(200):
        epoch, inside = divmod(k, 100)
        loss = 3.9 + 0.02 * rng.standard_normal()
        lines.append(openclip_line(1 + epoch, 256 * (inside + 1), 25600, loss, old=False))
    path = write(tmp_path / "out.log", lines[0], lines[1:])
    run = read_foreign(path, trainers=TRAINERS)
    found = judge_foreign(path, trainers=TRAINERS)
    assert [row["step"] for row in run.rows] == list(range(1, 401))
    assert run.context.steps_total == 400
    assert any("changed: 128, then 256" in note for note in run.notes)
    assert any("resumed 1 times" in note for note in run.notes)
    (spike,) = [item for item in found["events"] if item["marker"] == "loss_spike"]
    assert (spike["first_step"], spike["last_step"]) == (101, 104)


@pytest.mark.parametrize("tail", [b'{"imagenet-zeroshot-val-top1": 0.0', b"\0\0\0\xff\n"])
def test_a_cut_line_of_results_is_left_out(tmp_path: Path, tail: bytes) -> None:
    """A run that was killed while it wrote: the whole lines count, and the cut one is told."""
    lines = [openclip_line(0, 128 * k, 25600, 4.0, old=False) for k in range(1, 201)]
    write(tmp_path / "out.log", lines[0], lines[1:])
    whole = b'{"imagenet-zeroshot-val-top1": 0.25}\n'
    (tmp_path / "results.jsonl").write_bytes(whole + tail)
    run = read_foreign(tmp_path, trainers=TRAINERS)
    assert [row["imagenet_top1"] for row in run.evaluations] == [0.25]
    assert any("cut or damaged" in note for note in run.notes)


def events(folder: Path, **series: Sequence[float]) -> None:
    """Event files with one scalar of each tag a step (two underscores are a slash)."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)
    for name, values in series.items():
        for step, value in enumerate(values, start=1):
            writer.add_scalar(name.replace("__", "/"), value, step)
    writer.close()


def test_event_files_of_two_runs_or_two_losses(tmp_path: Path) -> None:
    """Two runs below one folder are refused; train/loss beside val/loss is the one judged."""
    pytest.importorskip("tensorboard", reason="reading event files is optional")
    events(tmp_path / "two" / "version_0", loss=losses())
    events(tmp_path / "two" / "version_1", loss=losses(bad=None))
    with pytest.raises(ForeignError, match="2 runs lie below one folder"):
        judge_foreign(tmp_path / "two")
    assert judge_foreign(tmp_path / "two" / "version_0")["verdict"] == "NUMERIC_FAIL"
    events(tmp_path / "each", train__loss=losses(), val__loss=losses(bad=None))
    found = judge_foreign(tmp_path / "each")
    assert found["verdict"] == "NUMERIC_FAIL" and found["events"][0]["first_step"] == BAD
    events(tmp_path / "none", train__accuracy=losses(bad=None))
    with pytest.raises(ForeignError, match="no loss was found"):
        judge_foreign(tmp_path / "none")


def test_a_run_without_any_gradient_is_told(tmp_path: Path) -> None:
    """One pair a batch: loss and gradient are zero in every step, and nothing is learnt."""
    rows = [f"{k},0.0,0.0" for k in range(1, 301)]
    found = judge_foreign(write(tmp_path / "run.csv", "step,loss,grad_norm", rows), global_batch=64)
    assert found["verdict"] == "DEGRADED" and "NO_GRADIENT" in found["flags"]
