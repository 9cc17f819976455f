"""One rank's entry: a trial folder in, records and checkpoints out, whatever starts it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from small_trials import run, start, wait_for, write_trial

from ablate.recipes import openclip
from ablate.records.files import read_json, read_rows
from ablate.records.folder import TrialRecord
from ablate.trial.identity import EXIT_ALONE

STEPS = 12  # 2 epochs of 96 samples in batches of 16

MEASURED = {
    "step", "attempt", "time", "epoch", "samples", "lr", "loss", "grad_norm", "logit_scale",
    "step_time_s", "data_time_s", "samples_per_s", "in_batch_accuracy", "image_feature_std",
    "text_feature_std", "alignment", "data_faults",
}  # fmt: skip


def test_a_trial_leaves_its_records(tmp_path: Path, data: Path) -> None:
    """A run writes a row per step, a row per evaluation, a result, and the last checkpoints."""
    trial = write_trial(tmp_path / "t", data)
    assert run(trial.folder) == [0]
    rows = trial.trace()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(set(row) >= MEASURED for row in rows)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["samples"] == STEPS * 16 and rows[-1]["epoch"] == 2.0
    assert not any("scaler_scale" in row or "skipped_steps" in row for row in rows)
    assert {name for name in rows[9] if name.startswith("grad_norm/")} >= {
        "grad_norm/visual.layer1.0", "grad_norm/transformer.resblocks.1", "grad_norm/logit_scale"
    }  # fmt: skip
    evaluations = trial.evaluations()
    assert [row["step"] for row in evaluations] == [6, 12]
    assert all(0 <= row["imagenet_top1"] <= row["imagenet_top5"] <= 1 for row in evaluations)
    assert evaluations[0]["eval_images"] == 12
    result = trial.result(1)
    assert result is not None
    assert result["status"] == "completed" and result["verdict"] == "STABLE"
    assert result["step"] == result["steps_total"] == STEPS
    assert result["final"]["imagenet_top1"] == evaluations[-1]["imagenet_top1"]
    assert result["parameter_groups"]["decay"]["tensors"] > 0
    assert sorted(p.name for p in (trial.folder / "checkpoints").iterdir()) == [
        "step-000006", "step-000012"
    ]  # fmt: skip
    taken = sum(file.stat().st_size for file in trial.folder.glob("checkpoints/*/*"))
    # Too short for one by the clock, which the forecast of the disk allows for.
    config = {**trial.trial()["config"], "checkpoint_minutes": 0}
    foreseen = openclip.sketch(openclip.Config(**config)).disk_bytes
    assert foreseen < taken < 1.01 * foreseen  # counters and names come on top
    learned = trial.learned()
    assert learned is not None
    assert learned["verdict"] in ("learning", "not learning") and learned["flags"] == []
    assert learned["moved"] == learned["parameters"] == 96 and learned["images"] == 12
    assert set(learned["features"]["b"]) == {"knn", "linear", "zero_shot", "rank", "spread"}


def test_two_ranks_train_one_model(tmp_path: Path, data: Path) -> None:
    """Two ranks see the global batch that one rank of twice the batch size sees."""
    one = write_trial(tmp_path / "one", data, epochs=1)
    two = write_trial(tmp_path / "two", data, epochs=1, gang=2, batch_size=8)
    assert run(one.folder) == [0]
    assert run(two.folder, workers=2) == [0, 0]
    first, both = one.trace()[0], two.trace()[0]
    # BatchNorm sees halves of the batch, so the losses are near and not equal.
    assert both["loss"] == pytest.approx(first["loss"], abs=0.3)
    assert both["samples"] == first["samples"]
    assert two.evaluations()[0]["eval_images"] == 12
    make = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    assert (two.result(1) or {})["facts"]["makes"] == [make]


def test_torchrun_starts_the_same_entry(tmp_path: Path, data: Path) -> None:
    """`torchrun -m ablate.trial` gives the numbers that our own start gives."""
    ours = write_trial(tmp_path / "ours", data, epochs=1, gang=2, batch_size=8)
    theirs = write_trial(tmp_path / "theirs", data, epochs=1, gang=2, batch_size=8)
    assert run(ours.folder, workers=2) == [0, 0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "ablate.trial", str(theirs.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in theirs.trace()] == [row["loss"] for row in ours.trace()]


def test_sigterm_checkpoints_and_the_next_attempt_goes_on(tmp_path: Path, data: Path) -> None:
    """SIGTERM to one rank: all leave at one step with 75; the next attempt ends the trial."""
    whole = write_trial(tmp_path / "whole", data, epochs=3, gang=2, batch_size=8)
    cut = write_trial(tmp_path / "cut", data, epochs=3, gang=2, batch_size=8)
    assert run(whole.folder, workers=2) == [0, 0]
    ranks = start(cut.folder, workers=2)
    wait_for(lambda: len(cut.trace()) >= 2, "the second step")
    pid = ranks.processes[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    stopped_at = cut.trace()[-1]["step"]
    assert (cut.folder / "checkpoints" / f"step-{stopped_at:06d}" / "manifest.json").exists()
    assert cut.result(1) is None
    assert run(cut.folder, workers=2) == [0, 0]
    assert [row["step"] for row in read_rows(cut.attempt_folder(2) / "trace.jsonl")] == list(
        range(stopped_at + 1, 19)
    )
    assert [row["loss"] for row in cut.trace()] == [row["loss"] for row in whole.trace()]
    assert _final_weights(cut) == _final_weights(whole)


def test_a_diverging_trial_ends_with_a_result(tmp_path: Path, data: Path) -> None:
    """Non-finite losses end the trial on all ranks as diverged, exit status 0."""
    trial = write_trial(
        tmp_path / "t", data, gang=2, batch_size=8, precision="pure_fp16", eps=1e-8, epochs=3
    )
    assert run(trial.folder, workers=2) == [0, 0]
    result = trial.result(1)
    assert result is not None
    assert result["status"] == "diverged" and result["verdict"] == "NUMERIC_FAIL"
    assert result["stop"]["step"] < result["steps_total"]
    assert any(math.isnan(row["loss"]) for row in trial.trace())
    assert any(event["severity"] == "fatal" for event in trial.events())
    learned = trial.learned()
    assert learned is not None and learned["verdict"] == "collapsed"
    assert learned["reasons"] == ["weights are not finite"]


def test_a_wrong_world_size_is_refused(tmp_path: Path, data: Path) -> None:
    """Starting one rank of a trial that asks for two says how to start two."""
    trial = write_trial(tmp_path / "t", data, gang=2)
    assert run(trial.folder) != [0]
    assert "--nproc_per_node 2" in (trial.folder / "log-0.txt").read_text()


def test_the_attempt_number_can_be_given(tmp_path: Path, data: Path) -> None:
    """ABLATE_ATTEMPT names the attempt's folder."""
    trial = write_trial(tmp_path / "t", data, epochs=1)
    assert run(trial.folder, ABLATE_ATTEMPT="4") == [0]
    assert trial.attempts() == [4]
    assert trial.trace()[0]["attempt"] == 4


def _final_weights(trial: TrialRecord) -> str:
    steps = sorted((trial.folder / "checkpoints").glob("step-*"))
    manifest = read_json(steps[-1] / "manifest.json")
    digest: str = manifest["files"]["model.safetensors"]["sha256"]
    return digest


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train_data": "train/{00000..00005}.tar"}, "data fault: 3 shards"),
        ({"init_from": {"path": "nowhere.safetensors"}}, "weights: init_from"),
    ],
)
def test_what_retrying_cannot_mend_is_a_result(
    tmp_path: Path, data: Path, changes: dict[str, Any], reason: str
) -> None:
    """Missing data or weights end each rank by itself, with the reason in result.json."""
    trial = write_trial(tmp_path / "t", data, gang=2, **changes)
    assert run(trial.folder, workers=2) == [EXIT_ALONE, EXIT_ALONE]
    result = trial.result(1)
    assert result is not None
    assert result["status"] == "failed" and result["reason"].startswith(reason)


def test_out_of_memory_is_a_result_with_the_batch_size_to_try(tmp_path: Path, data: Path) -> None:
    """A batch that does not fit ends the trial as infeasible, not as a crash to be repeated."""
    trial = write_trial(tmp_path / "t", data, batch_size=96, force_image_size=512)
    ranks = start(trial.folder)
    process = psutil.Process(ranks.processes[0].pid)
    room = process.memory_info().vms + 2**29
    process.rlimit(psutil.RLIMIT_AS, (room, room))
    assert ranks.wait() == [0]
    result = trial.result(1)
    assert result is not None and result["status"] == "infeasible"
    assert "batch_size 96 with accum_freq 1 does not fit in memory" in result["reason"]
    assert "try batch_size 48 with accum_freq 2" in result["reason"]


def test_a_rank_that_ends_alone_says_so(tmp_path: Path, data: Path) -> None:
    """Out of memory on one of two ranks: the result stands, and its exit status tells the keeper
    to end the others, who may wait in a collective for ever."""
    trial = write_trial(tmp_path / "t", data, gang=2, batch_size=48, force_image_size=512)
    ranks = start(trial.folder, workers=2)
    process = psutil.Process(ranks.processes[1].pid)
    room = process.memory_info().vms + 2**29
    process.rlimit(psutil.RLIMIT_AS, (room, room))
    assert ranks.wait()[1] == EXIT_ALONE
    result = trial.result(1)
    assert result is not None and result["status"] == "infeasible"
