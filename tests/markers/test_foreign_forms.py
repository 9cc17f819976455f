"""Forms in which logs reach us: other encodings and formats, lines of held-out data, what is cut.

Each kind has a loss that is no number from step 301 on, or is healthy where something beside it is
not: shapes as timm, MMEngine, fairseq, SwAV, PyTorch's example, llm.c, Comet, MLflow's REST answer,
W&B's exports of Hugging Face runs and R, Excel and PowerShell write them.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ablate.markers.event import number
from ablate.markers.foreign import ForeignError, judge_foreign, read_foreign

BAD, STEPS = 301, range(1, 401)
_RNG = np.random.default_rng(3)
_FALLING = [2.0 + 3.0 * math.exp(-k / 60) + 0.03 * float(_RNG.standard_normal()) for k in STEPS]


def value(k: int) -> float:
    return math.nan if k >= BAD else _FALLING[k - 1]


def sound(k: int) -> float:
    return _FALLING[k - 1]


def lines(line: Callable[[int], str]) -> str:
    return "\n".join(map(line, STEPS)) + "\n"


TABLE = "step,loss\n" + lines(lambda k: f"{k},{value(k)}")
BROKEN: dict[str, tuple[str, bytes]] = {
    "UTF-16, as PowerShell redirects": (
        "a.log", lines(lambda k: f"step: {k} loss: {value(k)}").encode("utf-16")
    ),
    "UTF-16 between tabs, as Excel saves": ("a.txt", TABLE.replace(",", "\t").encode("utf-16")),
    "a header in Latin-1": ("a.csv", TABLE.replace("loss", "loss,Größe", 1).encode("latin-1")),
    "comments before the header": ("a.csv", f"# by hand\n# twice\n{TABLE}".encode()),
    "a header that is a comment": ("a.csv", f"# {TABLE}".encode()),
    "sep=; before the header": ("a.csv", f"sep=;\n{TABLE.replace(',', ';')}".encode()),
    "columns between bars": ("a.csv", TABLE.replace(",", "|").encode()),
    "decimal commas with exponents": ("a.csv", TABLE.replace(",", ";").replace(".", ",").encode()),
    "nan as C prints it on Windows": ("a.csv", TABLE.replace("nan", "-nan(ind)").encode()),
    "nan of an older C": ("a.csv", TABLE.replace("nan", "1.#QNAN").encode()),
    "a line of zero bytes": ("a.csv", (TABLE + "\0" * 512 + "\n").encode()),
    "MLflow's REST answer": ("a.json", json.dumps({"metrics": [
        {"key": "train_loss", "value": value(k), "timestamp": 1, "step": k} for k in STEPS
    ]}).encode()),
    "Comet's metrics": ("a.json", json.dumps({"metrics": [
        {"metricName": "loss", "metricValue": str(value(k)), "step": k} for k in STEPS
    ]}).encode()),
    "PyTorch's example": ("a.log", lines(
        lambda k: f"Epoch: [0][{k:5d}/1251]\tTime  0.5\tLoss {value(k):.4e} (7.0e+00)\tAcc@1 0"
    ).encode()),
    "SwAV": ("a.log", lines(
        lambda k: f"INFO - 0:00:10 - Epoch: [0][{k}]\tTime 0.5\tLoss {value(k)} (7.0)\tLr: 0.1"
    ).encode()),
    "MMEngine by iterations": ("a.log", lines(
        lambda k: f"mmengine - Iter(train) [{k:6d}/80000]  loss: {value(k)}  decode.loss: 1.0"
    ).encode()),
    "DINOv2": ("a.log", lines(
        lambda k: f"I2024 dinov2] Training  [{k:6d}/125000]  lr: 0.1  total_loss: {value(k)} (9)"
    ).encode()),
    "MaxText": ("a.log", lines(
        lambda k: f"completed step: {k}, seconds: 1.2, Tokens/s/device: 300.1, loss: {value(k)}"
    ).encode()),
    "DeepSpeed": (
        "a.log", lines(lambda k: f"steps: {k} loss: {value(k)} iter time (s): 0.1").encode()
    ),
    "print, with nothing between": (
        "a.log", lines(lambda k: f"step {k} loss {value(k)} lr 0.1").encode()
    ),
    "PyTorch's name of a rank": (
        "a.log", lines(lambda k: f"[rank0]: step {k} loss {value(k)}").encode()
    ),
    "srun's number of each task": ("a.log", lines(
        lambda k: f"0: step {k} loss {value(k)}\n1: step {k} loss {sound(k)}"
    ).encode()),
    "Ray's coloured name of a worker": ("a.log", lines(
        lambda k: f"\x1b[36m(Worker pid=7, ip=10.0.0.1)\x1b[0m step {k} loss {value(k)}"
    ).encode()),
    "Caffe's, with the rate on lines of its own": ("a.log", lines(
        lambda k: f"solver.cpp:228] Iteration {k}, loss = {value(k)}\nIteration {k}, lr = 0.01"
    ).encode()),
    "steps of an epoch each, in words": ("a.log", lines(
        lambda k: f"Epoch {(k - 1) // 100} Step {(k - 1) % 100 + 1}: loss = {value(k)}"
    ).encode()),
    "NeMo's bar": ("a.log", "\r".join(
        f"Epoch 0: {k}/400 [00:10<00:10, reduced_train_loss={value(k)}, global_step={k}.0]"
        for k in STEPS
    ).encode()),
    "the table of a model card": ("a.md", (
        "| Step | Training Loss | Validation Loss |\n|:---:|---|---|\n"
        + lines(lambda k: f"| {k} | {value(k)} | {'No log' if k % 2 else 2.0} |")
    ).encode()),
    "names with a slash": ("a.log", lines(
        lambda k: f"step: {k} train/loss: {value(k)} val/loss: 2.0"
    ).encode()),
    "names with a point": (
        "a.log", lines(lambda k: f"step: {k} loss: {value(k)} aux.loss: 2.0").encode()
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", BROKEN)
def test_a_loss_that_is_no_number_is_found_in_what_other_programs_write(
    form: str, tmp_path: Path
) -> None:
    name, content = BROKEN[form]
    (tmp_path / name).write_bytes(content)
    found = judge_foreign(tmp_path / name)
    assert found["verdict"] == "NUMERIC_FAIL", found
    assert found["events"][0]["first_step"] == BAD


def test_a_parquet_file_is_one_whatever_it_is_called(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"step": list(STEPS), "loss": [value(k) for k in STEPS]})
    parquet.write_table(table, tmp_path / "history.dat")
    assert judge_foreign(tmp_path / "history.dat")["verdict"] == "NUMERIC_FAIL"


HELD_OUT = {
    "timm": lambda k: (
        f"Train: {k // 100} [{k % 100:>4d}/100 (  1%)]  Loss: {sound(k)} ({sound(k)})  LR: 1e-06\n"
        "Test: [  78/78]  Time: 0.04 (0.5)  Loss:     nan (   nan)  Acc@1: 1.0 ( 1.0)"
    ),
    "MMEngine": lambda k: (
        f"Epoch(train)  [{k // 100}][{k % 100:4d}/100]  lr: 1e-3  loss: {sound(k)}\n"
        f"Epoch(val)  [{k // 100}][{k % 100:4d}/100]  loss: nan"
    ),
    "lines without a step": lambda k: (
        f"Train Epoch {k} loss: {sound(k)}\nValidation Epoch {k} loss: nan"
    ),
    "fairseq": lambda k: (
        f"| INFO | train_inner | epoch 001: {k} / 1000 loss={sound(k)}, num_updates={k}\n"
        f"| INFO | valid | epoch 001 | valid on 'valid' subset | loss nan | num_updates {k}"
    ),
    "names with a slash": lambda k: f"step: {k} train/loss: {sound(k)} val/loss: nan",
}  # fmt: skip


@pytest.mark.parametrize("form", HELD_OUT)
def test_a_held_out_loss_in_a_log_is_no_training_loss(form: str, tmp_path: Path) -> None:
    """Whatever it is, the verdict is that of the training, and the note says what was left out."""
    (tmp_path / "a.log").write_text(lines(HELD_OUT[form]))
    found = judge_foreign(tmp_path / "a.log")
    assert found["verdict"] == "STABLE", found["events"]
    assert any("held-out" in note or "were not read" in note for note in found["notes"])


def test_a_log_whose_every_line_says_test_is_read(tmp_path: Path) -> None:
    """It is then a word of the run's name."""
    (tmp_path / "a.log").write_text(lines(lambda k: f"[test] step: {k} loss: {value(k)}"))
    assert judge_foreign(tmp_path / "a.log")["events"][0]["first_step"] == BAD


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "more cells than columns": ("step,loss\n1,5,93\n2,5,91\n", "a.csv:2: 3 cells where the header"),
    "one row": ("step,loss\n4000,2.3\n", "the summary of a run and not its course"),
    "a final result": (json.dumps({"epoch": 3.0, "train_loss": 2.3}), "the summary of a run"),
    "a loss of zero throughout": ("step,loss\n" + lines(lambda k: f"{k},0.0"), "loss is 0 in each"),
    "a time as step": ("step,loss\n" + lines(lambda k: f"{10**18 + k},{sound(k)}"), "is it a time"),
    "a cut object": (
        json.dumps({"log_history": [{"step": 1, "loss": 2.0}] * 9})[:-9], "is cut here"
    ),
    "nested beyond reading": ("[" * 9000 + "]" * 9000, "JSON that holds no run"),
    "an endless number": (
        '{"step": 1, "loss": 1}\n{"step": 2, "loss": 1%s}\n{"step": 3}' % ("0" * 5000),
        "a.csv:2: no JSON",
    ),
    "a list of numbers": ("[2.3, 2.2, 2.1]", "JSON without records"),
    "two losses in a line": (
        lines(lambda k: f"step: {k} | student | loss: {sound(k)} | teacher | loss: 2.0"),
        "'loss' and 'loss #2' may both be loss",
    ),
    "a gzip archive": (gzip.compress(TABLE.encode()), "packed (gzip); unpack it"),
    "NumPy's array": (b"\x93NUMPY\x01\x00 x", "an array of NumPy's; save the table in it as CSV"),
    "an Excel workbook": (b"PK\x03\x04 x", "a workbook"),
    "empty cells by another name": (
        "step,loss\n" + lines(lambda k: f"{k},{'<NA>' if k >= BAD else sound(k)}"),
        "loss is empty here and in the 99 rows that follow",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_course_of_a_training_is_refused_by_its_own_name(
    kind: str, tmp_path: Path
) -> None:
    content, words = REFUSED[kind]
    file = tmp_path / "a.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ForeignError) as caught:
        judge_foreign(file)
    assert words in str(caught.value)


def test_the_optimizers_step_goes_before_the_trackers_count(tmp_path: Path) -> None:
    """W&B's `_step` counts what it was told; Hugging Face says the step beside it. One that stands
    in few rows is none."""
    file = tmp_path / "a.csv"
    file.write_text(
        "_step,train/global_step,train/loss\n" + lines(lambda k: f"{k},{k * 10},{value(k)}")
    )
    assert judge_foreign(file)["events"][0]["first_step"] == BAD * 10
    rare = lines(lambda k: f"{k},{k * 10 if k % 50 == 0 else ''},{value(k)}")
    file.write_text("_step,eval/step,train/loss\n" + rare)
    assert judge_foreign(file)["events"][0]["first_step"] == BAD


def test_a_share_in_per_cent_is_no_step(tmp_path: Path) -> None:
    """A progress bar begins with `Steps: 25%`."""
    text = "\r".join(
        f"Steps: {k // 4}%|##| {k}/400 [00:10, 9.9it/s, loss={value(k)}]" for k in STEPS
    )
    (tmp_path / "a.log").write_text(text)
    assert [row["step"] for row in read_foreign(tmp_path / "a.log").rows] == list(STEPS)


def test_numbers_beyond_a_float_are_infinite() -> None:
    assert number(10**400) == math.inf and number(-(10**400)) == -math.inf
    assert number("-1.#INF00") == -math.inf and math.isnan(number("1.#IND00") or 0.0)
    assert number("1.#") is None and number("ind") is None


def test_a_loss_with_a_name_of_its_own_is_said_by_the_caller(tmp_path: Path) -> None:
    """A log without a loss is refused with what its numbers are called; OLMo prints one a line."""
    place = tmp_path / "a.log"
    place.write_text(lines(
        lambda k: f"host:0 [step={k}/400]\n    train/CrossEntropyLoss={value(k)}\n    optim/x=1.2"
    ))  # fmt: skip
    with pytest.raises(ForeignError, match="called host, step, train/crossentropyloss, optim/x"):
        judge_foreign(place)
    judged = judge_foreign(place, columns={"loss": "train/CrossEntropyLoss"})
    assert judged["verdict"] == "NUMERIC_FAIL"


def test_numbers_before_a_colon_are_no_processes(tmp_path: Path) -> None:
    """Steps and epochs are written so, too: none is left out. Of processes that take turns the
    first is read, and it is said."""
    place = tmp_path / "a.log"
    place.write_text(lines(lambda k: f"{k}: loss={value(k)}"))
    assert len(read_foreign(place).rows) == len(STEPS)
    place.write_text(lines(lambda k: f"[rank0]: step {k} loss 2.5\n[rank1]: step {k} loss {k}.5"))
    read = read_foreign(place)
    assert {row["loss"] for row in read.rows} == {2.5} and len(read.rows) == len(STEPS)
    assert "of 2 processes the lines of rank0 were read" in read.notes
    both = "".join(lines(lambda k, r=r: f"[rank{r}]: step {k} loss {k}.5") for r in range(2))
    place.write_text(both)
    with pytest.raises(ForeignError, match="several runs in one source"):
        read_foreign(place)
