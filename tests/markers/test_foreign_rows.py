"""Rows of runs made elsewhere: a loss that was lost on the way never makes a run a sound one.

Each form below holds 400 steps of a healthy loss that is nan from step 301 on, or from the 51st
step of its second epoch. It is found there, or the source is refused with the line; never STABLE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from ablate.markers.foreign import ForeignError, judge_foreign
from ablate.markers.foreign.columns import quantity_of

STEPS, BAD = 400, 301


def healthy(step: int) -> float:
    return 2.0 + 3.0 * math.exp(-step / 100) + 0.01 * (step * 7 % 11) / 11


def losses(*, bad: int = BAD) -> list[float]:
    return [math.nan if step >= bad else healthy(step) for step in range(1, STEPS + 1)]


def write(folder: Path, name: str, lines: Iterable[str]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def numbered() -> list[tuple[int, float]]:
    return list(enumerate(losses(), start=1))


def by_epoch() -> list[tuple[int, int, float]]:
    """(epoch, step of 100, loss): nan from the 51st step of the second epoch on."""
    values = losses(bad=151)
    return [(at // 100, at % 100, values[at]) for at in range(STEPS)]


def json_lines(folder: Path, items: Iterable[dict[str, object]]) -> Path:
    return write(folder, "run.jsonl", map(json.dumps, items))


def split(folder: Path) -> Path:
    rows = [f"train,{k},{v}\nval,{k},2.0" for k, v in numbered()]
    return write(folder, "run.csv", ["split,step,loss", *rows])


def modes(folder: Path) -> Path:
    items = [
        {"mode": mode, "step": k, "loss": v if mode == "train" else 2.0}
        for k, v in numbered()
        for mode in ("train", "val")
    ]
    return json_lines(folder, items)


def nested(folder: Path) -> Path:
    return json_lines(folder, ({"step": k, "train": {"loss": v}} for k, v in numbered()))


def keras(folder: Path) -> Path:
    return write(folder, "h.json", [json.dumps({"loss": losses(), "val_loss": [2.0] * STEPS})])


def lightning(folder: Path) -> Path:
    rows = [f"0,{k},{v},\n0,{k},,2.0" for k, v in numbered()]
    write(folder, "version_0/metrics.csv", ["epoch,step,train_loss,val_loss", *rows])
    return folder


def fairseq(folder: Path) -> Path:
    items = [
        {"epoch": 1, "loss": str(v), "num_updates": str(k), "lr": "5e-4"} for k, v in numbered()
    ]
    return write(folder, "log", [f"INFO | train_inner | {json.dumps(item)}" for item in items])


def printed(line: str) -> Callable[[Path], Path]:
    return lambda folder: write(folder, "log", [line.format(k=k, v=v) for k, v in numbered()])


def printed_by_epoch(line: str) -> Callable[[Path], Path]:
    return lambda folder: write(
        folder, "log", [line.format(e=e, k=k, v=v) for e, k, v in by_epoch()]
    )


def iterations(folder: Path) -> Path:
    return json_lines(
        folder, ({"epoch": e + 1, "iter": k + 1, "loss": v} for e, k, v in by_epoch())
    )


def table_of_epochs(folder: Path) -> Path:
    return write(
        folder, "run.csv", ["epoch,step,loss", *(f"{e},{k},{v}" for e, k, v in by_epoch())]
    )


def empty(text: str) -> Callable[[Path], Path]:
    """A table in which what was not a number is an empty cell, as pandas writes it."""

    def make(folder: Path) -> Path:
        rows = [f"{k},{'' if math.isnan(v) else v},{text}" for k, v in numbered()]
        return write(folder, "run.csv", ["step,loss,lr", *rows])

    return make


def null(folder: Path) -> Path:
    items = ({"step": k, "loss": None if math.isnan(v) else v} for k, v in numbered())
    return json_lines(folder, items)


def skipped(folder: Path) -> Path:
    """Megatron-LM prints no loss for a step that was skipped."""
    lines = [
        f" iteration {k:8d}/ 400 |"
        + ("" if math.isnan(v) else f" lm loss: {v:.6E} |")
        + " loss scale: 1.0 | grad norm: 0.752 |"
        for k, v in numbered()
    ]
    return write(folder, "log", lines)


def rows(
    order: Callable[[list[tuple[int, float]]], Sequence[tuple[int, float]]],
) -> Callable[[Path], Path]:
    return lambda folder: write(
        folder, "run.csv", ["step,loss", *(f"{k},{v}" for k, v in order(numbered()))]
    )


def backwards(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return points[::-1]


def shuffled(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [points[k * 139 % STEPS] for k in range(STEPS)]


def uncounted(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Every step called 0, and a last value that is one."""
    return [*((0, v) for _, v in points), (0, 2.0)]


def twice(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A run, and after it another one in the same table."""
    return [*points, *((k, healthy(k)) for k, _ in points)]


def two_ranks(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [pair for k, v in points for pair in ((k, v), (k, healthy(k)))]


def mlflow(folder: Path) -> Path:
    lines = [f"a,loss,{v},0,{k}" for k, v in numbered()] + ["a,loss,2.0,0,401"]
    return write(folder, "run.csv", ["run_id,key,value,step,timestamp", *lines])


READ = {
    "split": split, "mode": modes, "nested JSON": nested, "Keras": keras, "a folder": lightning,
    "fairseq": fairseq, "nanoGPT": printed("iter {k}: loss {v:.4f}, time 9.0ms, mfu 30.0%"),
    "Hugging Face's output": printed("{{'loss': {v:.4f}, 'learning_rate': 1e-05, 'epoch': 0.5}}"),
    "blanks": lambda folder: write(
        folder, "run.txt", ["step loss lr", *(f"{k}  {v} 0.001" for k, v in numbered())]
    ),
}  # fmt: skip
BY_EPOCH = {
    "mmcv": iterations, "a table": table_of_epochs,
    "MAE's output": printed_by_epoch("Epoch: [{e}]  [{k:>4}/100]  eta: 0:01  loss: {v:.4f} (2.1)"),
    "a tutorial": printed_by_epoch("Epoch [{e}/4], Step [{k}/100], Loss: {v:.4f}"),
    "PaddlePaddle": printed_by_epoch("[Train][Epoch {e}/4][Iter: {k}/100]lr: 0.1, loss: {v:.4f}"),
    "timm's output": printed_by_epoch("Train: {e} [{k:>4d}/100 ({k}%)]  Loss: {v:.3g} (2.1)"),
}  # fmt: skip
REFUSED = {
    "pandas": (empty("1e-3"), "run.csv:302: loss is empty here and in the 99 rows that follow"),
    "pandas, loss alone": (empty(""), "loss is empty here"),
    "null": (null, "run.jsonl:301: loss is empty here"),
    "skipped steps": (skipped, "loss is empty here"),
    "backwards": (rows(backwards), "step begins anew at 399"),
    "shuffled": (rows(shuffled), "step goes back in 138 of 400 rows"),
    "all steps 0": (rows(uncounted), "another value for the step of the row before"),
    "MLflow without steps": (mlflow, "another value for the step of the row before"),
    "one run after another": (rows(twice), "step begins anew at 1: several runs in one source"),
    "two ranks": (rows(two_ranks), "another value for the step of the row before"),
}


@pytest.mark.parametrize("form", READ)
def test_a_loss_that_is_no_number_is_found_in_every_form(form: str, tmp_path: Path) -> None:
    """NUMERIC_FAIL from step 301 on."""
    found = judge_foreign(READ[form](tmp_path))
    assert (found["verdict"], found["rows"]) == ("NUMERIC_FAIL", STEPS), found["notes"]
    assert found["events"][0]["first_step"] == BAD


def test_the_step_that_a_line_names_is_its_step(tmp_path: Path) -> None:
    """torchtune's lines have no colon behind it, and here are of every tenth step alone."""
    path = write(tmp_path, "log", [f"Step {10 * k} | loss:{v} lr:0.001" for k, v in numbered()])
    assert judge_foreign(path)["events"][0]["first_step"] == 10 * BAD


@pytest.mark.parametrize(
    "name", ["lr-AdamW", "lr-LARS", "lr-Lion/pg1", "lr-DecoupledAdamW/group0", "lr-SGD-momentum"]
)
def test_a_learning_rate_is_known_by_its_optimizers_curve(name: str) -> None:
    """Of Lightning's and Composer's monitors, of the first group; its momentum is another curve."""
    assert quantity_of(name) == (None if "momentum" in name else "lr", False)
    assert quantity_of("lr-AdamW/pg2") == (None, False)


@pytest.mark.parametrize("form", BY_EPOCH)
def test_steps_that_begin_anew_with_every_epoch_are_counted_on(form: str, tmp_path: Path) -> None:
    """They are no resume: all 400 rows are there, and nan begins in the middle of epoch two."""
    found = judge_foreign(BY_EPOCH[form](tmp_path))
    assert (found["verdict"], found["rows"]) == ("NUMERIC_FAIL", STEPS), found["notes"]
    assert found["events"][0]["first_step"] in (150, 151)
    assert any("counted on, 100 to one of them" in note for note in found["notes"])


@pytest.mark.parametrize("form", REFUSED)
def test_what_lost_its_loss_or_its_order_is_refused_with_the_place(
    form: str, tmp_path: Path
) -> None:
    make, says = REFUSED[form]
    with pytest.raises(ForeignError) as caught:
        judge_foreign(make(tmp_path))
    assert says in str(caught.value)


def test_a_loss_that_is_written_rarely_has_no_holes(tmp_path: Path) -> None:
    """Every 50th row has a loss, and rows of an evaluation have none: nothing is missing."""
    lines = [f"{k},{healthy(k) if k % 50 == 0 else ''},1e-3," for k in range(1, 2001)]
    lines += [f"{2000 + k},,,0.5" for k in range(1, 301)]
    path = write(tmp_path, "run.csv", ["step,loss,lr,val_accuracy", *lines])
    assert judge_foreign(path)["verdict"] == "STABLE"


def test_a_resumed_run_of_a_tracker_is_one_resume(tmp_path: Path) -> None:
    """MLflow's export keeps what was replayed: the later values count, and it is said."""
    first = [f"a,loss,{v},{k}" for k, v in numbered()]
    again = [f"a,loss,{healthy(k)},{k}" for k in range(250, STEPS + 1)]
    path = write(tmp_path, "run.csv", ["run_id,key,value,step", *first, *again])
    found = judge_foreign(path)
    assert any("steps go back 1 times" in note for note in found["notes"])
