"""Checkpoints: whole or not there, verified, and the one before when damaged."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ablate.errors import CheckpointError
from ablate.records.files import read_json, write_json
from ablate.training import checkpoint
from ablate.training.checkpoint import Snapshot


def snapshot(step: int, *, size: int = 10) -> Snapshot:
    weights = torch.arange(size, dtype=torch.float32) + step
    counter = {"norm.num_batches_tracked": torch.tensor(step)}
    return Snapshot(
        step,
        {"w": weights, "half": weights.bfloat16(), **counter},
        {"w/exp_avg": weights / 2, "w/step": torch.tensor(float(step))},
        {"step": step, "best": {"imagenet_top1": float("nan")}},
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    """Tensors bit by bit with their types, state with its non-finite numbers."""
    path = checkpoint.save(tmp_path, snapshot(500))
    assert path.name == "step-000500" and checkpoint.fault(path) is None
    back, there = checkpoint.load(path), snapshot(500)
    for ours, theirs in ((back.model, there.model), (back.optimizer, there.optimizer)):
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        assert all(ours[n].dtype == theirs[n].dtype for n in ours)
    assert back.step == 500 and back.state["best"]["imagenet_top1"] != 0


def _flip_bit(path: Path) -> None:
    content = bytearray((path / "optimizer.safetensors").read_bytes())
    content[-3] ^= 4
    (path / "optimizer.safetensors").write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 20)


def _empty(path: Path) -> None:
    os.truncate(path / "state.json", 0)


def _no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _half_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 30)


def _no_state(path: Path) -> None:
    (path / "state.json").unlink()


@pytest.mark.parametrize(
    "harm", [_flip_bit, _truncate, _empty, _no_manifest, _half_manifest, _no_state]
)
def test_a_damaged_checkpoint_is_put_away_and_the_one_before_is_taken(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    """Whatever is wrong with the newest, it is reported, kept aside, and the older one wins."""
    checkpoint.save(tmp_path, snapshot(100))
    harm(checkpoint.save(tmp_path, snapshot(200)))
    reports: list[str] = []
    assert checkpoint.newest(tmp_path, report=reports.append) == tmp_path / "step-000100"
    assert len(reports) == 1 and "step 200" in reports[0]
    assert len(list((tmp_path / "quarantine").glob("step-000200-*"))) == 1
    assert checkpoint.steps(tmp_path) == [100]


def test_a_checkpoint_of_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A format that this version does not read is no damage: nothing is moved, nothing restarts."""
    path = checkpoint.save(tmp_path, snapshot(100))
    manifest = read_json(path / "manifest.json")
    write_json(path / "manifest.json", {**manifest, "format": checkpoint.FORMAT + 1})
    with pytest.raises(CheckpointError, match="format 3, and this version reads 2"):
        checkpoint.newest(tmp_path, report=pytest.fail)
    assert checkpoint.steps(tmp_path) == [100] and not (tmp_path / "quarantine").exists()


def test_the_highest_step_wins_whatever_the_clock_says(tmp_path: Path) -> None:
    """Modification times and the order of writing mean nothing; seven digits beat six."""
    for step in (1_000_000, 200, 999_999):
        os.utime(checkpoint.save(tmp_path, snapshot(step)), (step, step))
    os.utime(tmp_path / "step-1000000", (0, 0))
    newest = checkpoint.newest(tmp_path, report=pytest.fail)
    assert newest == tmp_path / "step-1000000"


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path: Path) -> None:
    """A temporary folder is never taken for a checkpoint."""
    leftover = tmp_path / ".step-000300.abcd1234.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path, report=pytest.fail) is None
    assert not leftover.exists()
    assert checkpoint.newest(tmp_path / "nowhere", report=pytest.fail) is None


def test_the_last_two_and_the_chosen_are_kept(tmp_path: Path) -> None:
    """Pruning deletes the others only."""
    for step in (10, 20, 30, 40, 50):
        checkpoint.save(tmp_path, snapshot(step))
    checkpoint.prune(tmp_path, keep=[20, 999])
    assert checkpoint.steps(tmp_path) == [20, 40, 50]


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path) -> None:
    """A checkpoint that does not fit is refused with the numbers; the others stay."""
    checkpoint.save(tmp_path, snapshot(1))
    huge = torch.empty(1, device="cpu").expand(2**45)  # 128 TiB that take no memory
    with pytest.raises(CheckpointError, match=r"free.* step 2 needs 281,474,976,710,656 bytes"):
        checkpoint.save(tmp_path, Snapshot(2, {"w": huge}, {}, {"step": 2}))
    assert checkpoint.newest(tmp_path, report=pytest.fail) == tmp_path / "step-000001"


def test_writing_beside_the_training_sees_the_step_it_was_given(tmp_path: Path) -> None:
    """copy_to_host detaches the snapshot: later updates do not reach the file."""
    weights = torch.zeros(1000)
    writer = checkpoint.Writer(tmp_path)
    copied = checkpoint.copy_to_host({"w": weights})
    writer.save(Snapshot(1, copied, {}, {"step": 1}), keep=())
    weights.fill_(9)
    writer.close()
    assert checkpoint.load(tmp_path / "step-000001").model["w"].sum() == 0


def test_training_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a checkpoint hangs in fsync, save() has returned: training waits for the copy alone."""
    let_go, flushing = threading.Event(), threading.Event()
    fsync = os.fsync

    def hang(number: int) -> None:
        flushing.set()
        assert let_go.wait(60)
        fsync(number)

    monkeypatch.setattr(os, "fsync", hang)
    writer = checkpoint.Writer(tmp_path)
    writer.save(snapshot(1), keep=())
    assert flushing.wait(60)
    assert checkpoint.steps(tmp_path) == []  # save() is back, and nothing is written yet
    let_go.set()
    writer.close()
    assert checkpoint.newest(tmp_path, report=pytest.fail) == tmp_path / "step-000001"


def test_only_a_checkpoint_on_disk_lets_an_older_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the newest cannot be written, those before it are all still there."""
    writer = checkpoint.Writer(tmp_path)
    for step in (1, 2):
        writer.save(snapshot(step), keep=())
    writer.wait()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        writer.save(snapshot(3), keep=())
        with pytest.raises(CheckpointError, match="has 10 bytes"):
            writer.wait()
    assert checkpoint.steps(tmp_path) == [1, 2]
    writer.close()


def test_what_goes_wrong_in_the_writer_reaches_the_training(tmp_path: Path) -> None:
    """An error of the background thread is raised at the next wait, not lost."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    writer = checkpoint.Writer(blocked)
    writer.save(snapshot(1), keep=())
    with pytest.raises(OSError):
        writer.close()
    assert not any(t.name.startswith("checkpoint") for t in threading.enumerate())
