"""Runs that were made elsewhere: CSV, TensorBoard, and a log that open_clip_train 3.3.0 wrote.

``assets/openclip_run`` is what ``python -m open_clip_train.main --model tiny-rn-a --batch-size 128
--epochs 3 --warmup 50 --log-every-n-steps 5 --report-to tensorboard`` left behind.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marker_traces import clip_loss, healthy_evaluations, judged, whole_rows

from ablate.markers import Context, Thresholds, judge
from ablate.markers.foreign import ForeignError, judge_foreign, read_foreign
from ablate.recipes.openclip import peer_runs
from ablate.records.files import dumps
from ablate.records.folder import TrialRecord
from ablate.report.replay import replay, replay_run

TRAINERS = (peer_runs(),)
OPENCLIP = Path(__file__).parent / "assets" / "openclip_run"


def write_csv(path: Path, rows: list[dict[str, Any]], *, delimiter: str = ",") -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def spiky_rows(steps: int = 1500) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    loss = clip_loss(rng, steps)
    loss[1000:1020] += 2.0 * np.exp(-np.arange(20) / 10.0)
    return [
        {
            "step": step,
            "loss": float(value),
            "grad_norm": float(3.0 + 0.2 * rng.standard_normal()),
            "logit_scale": 14.3,
            "lr": 1e-3,
            "comment": "fine",
        }
        for step, value in enumerate(loss, start=1)
    ]


def test_a_csv_is_judged_like_our_own_rows(tmp_path: Path) -> None:
    """The same rows, from a CSV with sparse accuracies, get the verdict of our own trace."""
    rows = spiky_rows()
    for row in rows:
        if row["step"] % 500 == 0:
            row["imagenet_top1"] = row["step"] / 1e4
    path = write_csv(tmp_path / "run.csv", rows)
    found = judge_foreign(path, global_batch=1024, warmup=100, trainers=TRAINERS)
    evals = [{"step": r["step"], "imagenet_top1": r["step"] / 1e4} for r in rows[499::500]]
    ours = judge(
        rows,
        evals,
        context=Context(global_batch=1024, warmup=100, steps_total=1500, accuracy="imagenet_top1"),
    )
    assert found["verdict"] == "SPIKY" and found["stop"] is None
    assert found["evaluations"] == 3
    assert found["events"] == [item.to_dict() for item in ours.events]
    assert [item["marker"] for item in found["events"]] == ["loss_spike", "spike_score"]
    assert found["events"][0]["first_step"] == 1001
    assert "ignored columns: comment" in found["notes"]
    assert not any(note.startswith("missing") for note in found["notes"])
    json.dumps(found, allow_nan=False)


def test_what_a_csv_lacks_is_said(tmp_path: Path) -> None:
    """Missing columns, an unknown batch size and silent markers are named."""
    path = write_csv(tmp_path / "loss.csv", [{"step": s, "loss": 2 + 1 / s} for s in range(1, 50)])
    found = judge_foreign(path, trainers=TRAINERS)
    assert "missing: grad_norm, logit_scale, lr, imagenet_top1" in found["notes"]
    assert any("global batch size is not known" in note for note in found["notes"])
    assert "accuracy_collapse" in found["silent"] and "loss_spike" not in found["silent"]
    assert found["missing"]["divergence"] == ["context.global_batch"]


@pytest.mark.parametrize("nan", ["nan", "NaN", "inf", "-Infinity"])
def test_nan_in_a_csv_is_a_finding(tmp_path: Path, nan: str) -> None:
    """Non-finite cells are read as such, and an empty cell is merely absent."""
    rows: list[dict[str, Any]] = [{"step": s, "loss": 2.0, "lr": 1e-3} for s in range(1, 300)]
    for row in rows[200:203]:
        row["loss"] = nan
    rows[100]["loss"] = ""
    found = judge_foreign(write_csv(tmp_path / "run.csv", rows), global_batch=1024)
    assert found["verdict"] == "NUMERIC_FAIL"
    assert found["stop"] == {"step": 203, "marker": "non_finite"}


def test_a_logarithmic_temperature_is_recognised(tmp_path: Path) -> None:
    """Values that never exceed ln 100 are the parameter; exp of it is judged, and it is said."""
    rows = [{"step": s, "loss": 2 + 1 / s, "logit_scale": 4.6052} for s in range(1, 1200)]
    found = judge_foreign(write_csv(tmp_path / "log.csv", rows), warmup=10)
    assert "SATURATED" in found["flags"]
    assert any("taken as the logarithm" in note for note in found["notes"])
    plain = [{"step": s, "loss": 2.0, "logit_scale": 14.3} for s in range(1, 300)]
    run = read_foreign(write_csv(tmp_path / "exp.csv", plain))
    assert run.rows[0]["logit_scale"] == 14.3


def test_accuracy_in_per_cent_and_on_every_row(tmp_path: Path) -> None:
    """A column that repeats its last value counts once per change, and 25 means 25 %."""
    rows = [
        {"step": s, "loss": 2.0, "imagenet_top1": 25.0 if s > 100 else 12.0} for s in range(1, 201)
    ]
    run = read_foreign(write_csv(tmp_path / "run.csv", rows), trainers=TRAINERS)
    assert [(e["step"], e["imagenet_top1"]) for e in run.evaluations] == [(1, 0.12), (101, 0.25)]


def test_steps_that_go_back_are_a_resume(tmp_path: Path) -> None:
    """A log that goes back in steps was resumed: what it replays counts, the first try does not."""
    rows = spiky_rows()
    again = [row | {"loss": 2.0 + 0.01 * (row["step"] % 3)} for row in rows[900:]]
    found = judge_foreign(write_csv(tmp_path / "run.csv", rows + again), global_batch=1024)
    assert found["rows"] == 1500
    assert not any(1000 <= item["first_step"] <= 1020 for item in found["events"])
    assert any("resumed" in note for note in found["notes"])


def test_semicolons_and_a_byte_order_mark(tmp_path: Path) -> None:
    """Spreadsheets write such files."""
    path = write_csv(tmp_path / "run.csv", spiky_rows()[:100], delimiter=";")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_foreign(path).rows) == 100


def test_rows_far_apart_are_judged_with_fewer_hits(tmp_path: Path) -> None:
    """With a row every 50 steps one high outlier is a spike, and the gaps are said."""
    rng = np.random.default_rng(0)
    rows = [
        {"step": 50 * k, "loss": 2.0 + 0.05 * float(rng.standard_normal())} for k in range(1, 600)
    ]
    rows[400]["loss"] += 2.0
    found = judge_foreign(write_csv(tmp_path / "run.csv", rows), global_batch=1024, warmup=1000)
    assert [e["first_step"] for e in found["events"] if e["marker"] == "loss_spike"] == [20050]
    assert any("every 50 steps" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("\x89PNG\x00,\x01\n\x02,\x03\n", "it is no text"),
        ("a,b\n1,2\n", "its columns are a, b"),
        ("step,loss\n", "no rows"),
        ("step,loss\n1,2.0\n2,high\n", r"run\.csv:3: loss is 'high'"),
        ("step,loss\nnan,2.0\n", r"run\.csv:2: step is 'nan'"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """The error says what was found, where, and what would be read."""
    path = tmp_path / "run.csv"
    path.write_text(text)
    with pytest.raises(ForeignError, match=words):
        read_foreign(path)


def test_a_place_without_a_run_is_refused(tmp_path: Path) -> None:
    """A missing path and an empty folder are told apart."""
    with pytest.raises(ForeignError, match="does not exist"):
        read_foreign(tmp_path / "nothing")
    with pytest.raises(ForeignError, match="neither a log that is known nor event files"):
        read_foreign(tmp_path)


@pytest.mark.parametrize("place", [OPENCLIP, OPENCLIP / "out.log"])
def test_a_real_openclip_log(place: Path) -> None:
    """Steps, batch, warm-up, temperature and exact accuracies of open_clip_train's own files."""
    run = read_foreign(place, trainers=TRAINERS)
    assert len(run.rows) == 30
    assert run.rows[0] == {
        "step": 1,
        "attempt": 1,
        "lr": 2e-05,
        "logit_scale": 14.286,
        "loss": 5.3677,
    }
    assert [row["step"] for row in run.rows[9:12]] == [46, 47, 52]
    assert run.rows[-1]["step"] == 138
    context = run.context
    assert (context.global_batch, context.warmup, context.steps_total) == (128, 50, 138)
    assert context.row_interval == 5
    assert [(e["step"], e["imagenet_top1"]) for e in run.evaluations] == [
        (92, 0.01620745542949757),
        (138, 0.024311183144246355),
    ]
    found = judge_foreign(place, trainers=TRAINERS)
    assert found["verdict"] == "STABLE"
    assert "missing: grad_norm" in found["notes"]


@pytest.mark.parametrize(
    ("version", "losses"), [("2_10_1", (3.2998, 2.2694)), ("2_20_0", (3.233, 2.0716))]
)
def test_a_real_log_of_2_x(version: str, losses: tuple[float, float]) -> None:
    """What open_clip_torch 2.10.1 (the loss first) and 2.20.0 (the loss last) wrote themselves: 2
    epochs of 6 steps of 16, every second step logged, evaluated after both."""
    run = read_foreign(OPENCLIP.parent / f"openclip_{version}", trainers=TRAINERS)
    assert [row["step"] for row in run.rows] == [1, 3, 5, 6, 7, 9, 11, 12]
    assert (run.rows[0]["loss"], run.rows[-1]["loss"]) == losses
    assert (run.rows[0]["lr"], run.rows[0]["logit_scale"]) == (0.00025, 14.286)
    context = run.context
    assert (context.global_batch, context.warmup, context.steps_total) == (16, 4, 12)
    assert [(e["step"], e["imagenet_top1"]) for e in run.evaluations] == [(6, 0.0), (12, 0.0)]


def test_a_log_without_its_results_has_the_rounded_accuracies(tmp_path: Path) -> None:
    """Only out.log: top-1 as the log rounds it, batch from the first line of an epoch."""
    text = (OPENCLIP / "out.log").read_text()
    lines = [line for line in text.splitlines() if "Epoch" in line]
    path = tmp_path / "out.log"
    path.write_text("\n".join(lines))
    run = read_foreign(path, trainers=TRAINERS)
    assert [e["imagenet_top1"] for e in run.evaluations] == [0.0162, 0.0243]
    assert run.context.global_batch == 128
    assert run.rows[-1]["step"] == 138


def test_a_resumed_openclip_log_counts_replayed_epochs_once(tmp_path: Path) -> None:
    """--resume latest appends to out.log and trains from the last whole epoch again."""
    lines = (OPENCLIP / "out.log").read_text().splitlines()
    second = next(k for k, line in enumerate(lines) if "Train Epoch: 1 [ 128" in line)
    crashed = lines[: second + 5]
    (tmp_path / "out.log").write_text("\n".join([*crashed, *lines[second:]]))
    run = read_foreign(tmp_path, trainers=TRAINERS)
    assert [row["attempt"] for row in run.rows] == [1] * 15 + [2] * 20
    assert judge_foreign(tmp_path, trainers=TRAINERS)["rows"] == 30


def test_a_diverged_openclip_log_is_recognised(tmp_path: Path) -> None:
    """A log whose losses are nan is NUMERIC_FAIL, though open_clip_train exits 0 after it."""
    text = (OPENCLIP / "out.log").read_text().splitlines()
    text = [
        line.split(" Contrastive_loss")[0] + " Contrastive_loss: nan (nan) Loss: nan (nan)"
        if "Train Epoch: 2" in line
        else line
        for line in text
    ]
    (tmp_path / "out.log").write_text("\n".join(text))
    found = judge_foreign(tmp_path, trainers=TRAINERS)
    assert found["verdict"] == "NUMERIC_FAIL"
    assert found["stop"] == {"step": 103, "marker": "non_finite"}


def test_tensorboard_events_of_openclip() -> None:
    """Event files of the same run: the log's losses, evaluations numbered by epoch converted."""
    pytest.importorskip("tensorboard", reason="reading event files is optional")
    run = read_foreign(OPENCLIP / "tensorboard", trainers=TRAINERS)
    log = read_foreign(OPENCLIP, trainers=TRAINERS)
    assert len(run.rows) == len(log.rows)
    for ours, theirs in zip(run.rows, log.rows, strict=True):
        assert ours["step"] == theirs["step"] - 1  # TensorBoard has the index of the step
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["logit_scale"] == pytest.approx(theirs["logit_scale"], abs=1e-3)
    assert [e["imagenet_top1"] for e in run.evaluations] == pytest.approx(
        [0.0162075, 0.0243112], abs=1e-6
    )
    assert [e["step"] for e in run.evaluations] == [92, 138]
    assert any("numbered by epoch" in note for note in run.notes)


def test_event_files_without_their_reader_say_what_to_install() -> None:
    """Where tensorboard is not installed the error names the package and the way around it."""
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from ablate.markers.foreign import ForeignError, read_foreign\n"
        "try: read_foreign(sys.argv[1])\n"
        "except ForeignError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(OPENCLIP / "tensorboard")],
        capture_output=True,
        text=True,
    )
    assert "pip install tensorboard; or export the scalars as CSV" in done.stdout, done.stderr


def write_trial(folder: Path, rows: list[dict[str, Any]], **result: Any) -> None:
    attempt = folder / "attempts" / "1"
    attempt.mkdir(parents=True)
    trial = {
        "format": 1,
        "id": folder.name,
        "config": {"batch_size": 512, "warmup": 100, "epochs": 2},
        "gang": {"workers": 2},
        "markers": {"loss_spike": {"sigma": 4.0}},
    }
    (folder / "trial.json").write_text(dumps(trial))
    (attempt / "trace.jsonl").write_text("".join(dumps(row) + "\n" for row in rows))
    evals = [row | {"attempt": 1} for row in healthy_evaluations(len(rows))]
    (attempt / "evals.jsonl").write_text("".join(dumps(row) + "\n" for row in evals))
    if result:
        (attempt / "result.json").write_text(dumps(result))


def test_a_trial_folder_is_judged_again(tmp_path: Path) -> None:
    """Replay takes the trial's own thresholds, or others, and the context the worker recorded."""
    rows = [row | {"attempt": 1} for row in whole_rows(np.random.default_rng(0), 1500)]
    for row in rows[1000:1006]:
        row["loss"] += 1.0
    for row in rows[1200:1203]:
        row["loss"] = math.nan
    context = Context(global_batch=1024, warmup=100, steps_total=5000, feature_dim=1024)
    told = {name: getattr(context, name) for name in Context.__slots__}
    write_trial(tmp_path / "t", rows, context=told | {"chance_top1": 0.001})
    own = replay(tmp_path / "t")
    assert own["verdict"] == "NUMERIC_FAIL"
    assert own["stop"] == {"step": 1203, "marker": "non_finite"}
    assert own["thresholds"] == {"loss_spike": {"sigma": 4.0}}
    assert [e["marker"] for e in own["events"]] == ["loss_spike", "spike_score", "non_finite"]
    blind = replay(
        tmp_path / "t",
        Thresholds({"loss_spike": {"sigma": 50.0, "name_sum": 50.0, "name_row": 50.0}}),
    )
    assert [e["marker"] for e in blind["events"]] == ["spike_score", "non_finite"]
    same = judged(rows, healthy_evaluations(1500), loss_spike={"sigma": 4.0})
    assert [item.to_dict() for item in same.events] == own["events"]


def test_a_trial_that_left_no_result_is_judged_from_its_configuration(tmp_path: Path) -> None:
    """After a crash the batch, warm-up and length come from trial.json and the rows' epochs."""
    from ablate.report.replay import trial_context

    rows = [{"step": s, "attempt": 1, "loss": 3.0, "epoch": s / 400} for s in range(1, 301)]
    write_trial(tmp_path / "t", rows)
    record = TrialRecord(tmp_path / "t")
    context = trial_context(record, record.trace())
    assert (context.global_batch, context.warmup, context.steps_total) == (1024, 100, 800)
    assert replay(tmp_path / "t")["rows"] == 300


def test_a_verdict_that_changed_is_said(tmp_path: Path) -> None:
    """A trial that older rules called DIVERGED and today's do not: both are told."""
    rows = [row | {"attempt": 1} for row in whole_rows(np.random.default_rng(0), 300)]
    write_trial(tmp_path / "t", rows, verdict="DIVERGED", markers={"version": 3})
    (found,) = replay_run(tmp_path / "t").values()
    assert found["verdict"] == "STABLE"
    assert found["recorded"] == {"verdict": "DIVERGED", "version": 3}


def test_the_package_reads_what_it_is_given_only(tmp_path: Path) -> None:
    """Reading a foreign run writes nothing beside it."""
    shutil.copytree(OPENCLIP, tmp_path / "run")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    judge_foreign(tmp_path / "run")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
