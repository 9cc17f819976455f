"""Checkpoints in an object store: the same promise as on disk, and nobody waits for the network.

The store is a real S3 server on loopback, spoken to as any other.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from small_trials import run, start, wait_for, write_trial

from ablate.errors import CheckpointError
from ablate.records import stores
from ablate.records.folder import TrialRecord
from ablate.training import checkpoint
from ablate.training.checkpoint import Snapshot
from ablate.training.remote import Remote, Uploader

SECRET = "hunter2hunter2hunter2"
TIMES = {"time", "step_time_s", "data_time_s", "samples_per_s", "attempt", "eval_time_s"}


class Store:
    """A bucket on a server that can be switched off and on again."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.open()
        self.client = boto3.client("s3")
        self.client.create_bucket(Bucket="models")

    def open(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def close(self) -> None:
        self._server.stop()

    def keys(self, prefix: str = "") -> list[str]:
        found = self.client.list_objects_v2(Bucket="models", Prefix=prefix).get("Contents", [])
        return [item["Key"] for item in found]

    def change(self, key: str, harm: Callable[[bytes], bytes]) -> None:
        body = self.client.get_object(Bucket="models", Key=key)["Body"].read()
        self.client.put_object(Bucket="models", Key=key, Body=harm(body))


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAABLATE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        made = Store(port)
        yield made
        made.client.close()
        made.close()


def snapshot(step: int) -> Snapshot:
    weights = torch.arange(2000, dtype=torch.float32) + step
    return Snapshot(step, {"w": weights}, {"w/exp_avg": weights / 2}, {"step": step})


def saved(folder: Path, remote: Remote, *steps: int) -> None:
    for step in steps:
        remote.put(checkpoint.save(folder, snapshot(step)))


# --------------------------------------------------------------------------- which places


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("/tmp/here", "no place in an object store"),
        ("pipe:curl evil", "no place in an object store"),
        ("file:///etc", "no place in an object store"),
        ("s4://bucket/x", "Allowed: s3, gs"),
        ("s3://key:hunter2@bucket/x", "Credentials and endpoints come from the environment"),
        ("s3://bucket/x?X-Amz-Signature=hunter2", "Credentials and endpoints"),
        ("s3://bucket/../other", "no bucket with a prefix"),
        ("s3:///x", "no bucket with a prefix"),
        ("s3://bucket/a\nb", "no bucket with a prefix"),
    ],
)
def test_only_a_bucket_and_a_prefix_are_taken(url: str, why: str) -> None:
    """Other schemes, ways out of the prefix and credentials in the URL are refused, unshown."""
    with pytest.raises(ValueError, match=why) as error:
        stores.check_url(url)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket/a/b-c_d.e/"])
def test_buckets_with_prefixes_are_taken(url: str) -> None:
    """With or without a slash at the end, which is dropped."""
    assert stores.check_url(url) == url.rstrip("/")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """gs:// goes through the same door, and says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"package gcsfs.*ablate-runner\[gs\]"):
        Remote("gs://bucket/x")


def test_a_bucket_that_cannot_be_written_is_told_before_anything_runs(store: Store) -> None:
    """The probe writes, reads and deletes one object; it leaves nothing and shows no secret."""
    assert stores.probe("s3://models/probe") == ""
    assert store.keys("probe") == []
    problem = stores.probe("s3://no-such-bucket/probe")
    assert "bucket" in problem.lower() and SECRET not in problem


# --------------------------------------------------------------------------- the promise


def test_a_checkpoint_goes_there_and_back(store: Store, tmp_path: Path) -> None:
    """Bit by bit, and without its manifest it is not there."""
    remote = Remote("s3://models/back/study/trial")
    saved(tmp_path / "here", remote, 5)
    assert store.keys("back/study/trial")[0].startswith("back/study/trial/step-000005/")
    assert Remote(remote.url).steps() == [5]
    found = remote.newest(tmp_path / "there", local=None, report=lambda text: None)
    assert found == tmp_path / "there/step-000005"
    assert torch.equal(checkpoint.load(found).model["w"], snapshot(5).model["w"])
    store.client.delete_object(Bucket="models", Key="back/study/trial/step-000005/manifest.json")
    assert remote.steps() == []


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("model.safetensors", lambda body: body[:-3] + b"\xff" + body[-2:]),
        ("optimizer.safetensors", lambda body: body[:20]),
        ("state.json", lambda body: b""),
        ("manifest.json", lambda body: body[:30]),
    ],
)
def test_what_is_damaged_there_is_put_aside(
    store: Store, tmp_path: Path, file: str, harm: Callable[[bytes], bytes]
) -> None:
    """It is told, kept under quarantine/, never appears on disk, and the one before is taken."""
    prefix = f"damage/{file}"
    remote = Remote(f"s3://models/{prefix}")
    saved(tmp_path / "here", remote, 1, 2)
    store.change(f"{prefix}/step-000002/{file}", harm)
    reports: list[str] = []
    there = tmp_path / "there"
    assert remote.newest(there, local=None, report=reports.append) == there / "step-000001"
    assert "step 2" in reports[0] and "damaged" in reports[0]
    assert sorted(os.listdir(there)) == ["step-000001"]
    assert remote.steps() == [1]
    assert len(store.keys(f"{prefix}/quarantine/step-000002-")) == 4


def test_the_newest_of_both_homes_is_taken(store: Store, tmp_path: Path) -> None:
    """What is only on disk is newer than what arrived, or the other way round."""
    remote = Remote("s3://models/both")
    saved(tmp_path / "a", remote, 1, 2)
    ahead = checkpoint.save(tmp_path / "b", snapshot(3))
    assert remote.newest(tmp_path / "b", local=ahead, report=pytest.fail) == ahead
    behind = checkpoint.save(tmp_path / "c", snapshot(1))
    found = remote.newest(tmp_path / "c", local=behind, report=lambda text: None)
    assert found == tmp_path / "c/step-000002"


def test_the_last_two_the_best_and_the_chosen_stay_there(store: Store, tmp_path: Path) -> None:
    """As on disk; what is left of a copy that broke off goes, too."""
    remote = Remote("s3://models/keep")
    store.client.put_object(Bucket="models", Key="keep/step-000015/model.safetensors", Body=b"half")
    uploader = Uploader(tmp_path, remote)
    writer = checkpoint.Writer(tmp_path, uploader)
    for step in (10, 20, 30, 40, 50):
        writer.save(snapshot(step), keep=[20, 999])
        writer.wait()
        wait_for(lambda s=step: s in remote.steps(), "the copy")
    writer.close()
    assert remote.steps() == checkpoint.steps(tmp_path) == [20, 40, 50]
    assert not store.keys("keep/step-000015")


def test_a_slow_store_holds_nothing_up(store: Store, tmp_path: Path) -> None:
    """While one copy hangs, later checkpoints are written, and its source stays on disk."""
    release, begun = threading.Event(), threading.Event()

    class Slow(Remote):
        def put(self, path: Path) -> None:
            begun.set()
            assert release.wait(60)
            super().put(path)

    remote = Slow("s3://models/slow")
    writer = checkpoint.Writer(tmp_path, Uploader(tmp_path, remote))
    writer.save(snapshot(1), keep=())
    assert begun.wait(60)
    for step in (2, 3, 4):
        writer.save(snapshot(step), keep=())
        writer.wait()
    assert checkpoint.steps(tmp_path) == [1, 3, 4]
    release.set()
    writer.close()
    assert remote.steps() == [3, 4]


def test_an_absent_store_holds_nothing_up_and_is_caught_up_with(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saving goes on while the store is away; back again, it gets what should be there.

    The log says what is wrong, once, and no secret.
    """
    remote = Remote("s3://models/away")
    uploader = Uploader(tmp_path, remote, pause_s=0.1)
    writer = checkpoint.Writer(tmp_path, uploader)
    store.close()
    try:
        with caplog.at_level(logging.WARNING, "ablate"):
            for step in (1, 2, 3, 4):
                writer.save(snapshot(step), keep=[1])
                writer.wait()
            wait_for(lambda: uploader.trouble, "the outage to be noticed")
    finally:
        store.open()
    writer.close()
    assert remote.steps() == [1, 3, 4]
    assert [record.name for record in caplog.records].count("ablate") == 1
    assert SECRET not in caplog.text
    assert uploader.trouble is None


def test_without_store_and_disk_nothing_is_begun_again(store: Store, tmp_path: Path) -> None:
    """A store that does not answer must not look like a run that never began."""
    remote = Remote("s3://models/dark")
    local = checkpoint.save(tmp_path / "here", snapshot(1))
    store.close()
    try:
        reports: list[str] = []
        assert remote.newest(tmp_path / "here", local=local, report=reports.append) == local
        assert "cannot be asked" in reports[0]
        with pytest.raises(CheckpointError, match="none on this disk"):
            remote.newest(tmp_path / "nowhere", local=None, report=pytest.fail)
        uploader = Uploader(tmp_path / "here", remote, pause_s=0.1)
        uploader.wake(keep=())
        began = time.monotonic()
        assert uploader.close(timeout_s=0.5) is False
        assert time.monotonic() - began < 60
    finally:
        store.open()


# --------------------------------------------------------------------------- real trials


def measured(trial: TrialRecord) -> list[dict[str, Any]]:
    return [
        {k: json.dumps(v) for k, v in row.items() if k not in TIMES}
        for row in [*trial.trace(), *trial.evaluations()]
    ]


@pytest.mark.drill
def test_a_trial_goes_on_where_no_disk_has_its_checkpoint(
    store: Store, tmp_path: Path, data: Path
) -> None:
    """Killed, its disk lost, taken up by two ranks elsewhere: every number as if never killed.

    Nothing that the trial wrote holds the secret key.
    """
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    settings = {"epochs": 3, "batch_size": 8}
    whole = write_trial(tmp_path / "whole", data, gang=2, **settings)
    assert run(whole.folder, workers=2) == [0, 0]
    trial = write_trial(tmp_path / "trial", data, gang=2, **settings)
    url = f"s3://models/real/{trial.trial_id}"
    env[stores.CHECKPOINTS] = url
    ranks = start(trial.folder, workers=2, **env)
    try:
        wait_for(lambda: Remote(url).steps() or trial.result(1), "a copy")
    finally:
        ranks.signal(signal.SIGKILL)
        ranks.wait()
    shutil.rmtree(trial.folder / "checkpoints")
    assert run(trial.folder, workers=2, **env) == [0, 0]
    last = trial.attempts()[-1]
    first = trial.first_row(last)  # none: the copy is of the last step, which leaves no training
    assert last == 1 or first is None or first["step"] > 1, "it began again"
    assert measured(trial) == measured(whole)
    assert Remote(url).steps() == checkpoint.steps(trial.folder / "checkpoints")
    files = [path for path in trial.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_the_best_model_is_exported_from_the_store(store: Store, tmp_path: Path) -> None:
    """A report machine that has no checkpoint on disk brings the one it needs."""
    import open_clip
    from synthetic import study_of, write_study

    from ablate.recipes import openclip
    from ablate.report.best import recommend
    from ablate.report.export import export_best
    from ablate.study.table import read_table

    text = """
recipe: openclip
baseline: {model: tiny-rn-a, train_data: x.tar, imagenet_val: val, beta2: 0.999}
factors: {beta2: [0.999, 0.98]}
seeds: [0, 1, 2]
checkpoints: s3://models/export/
"""
    study = study_of(tmp_path, text)
    record = write_study(tmp_path, study, effects={("beta2", "0.98"): 0.06}, diverged={})
    chosen = recommend(read_table(study, record, curves=False)).run
    openclip.model.register_models()
    model = open_clip.create_model("tiny-rn-a", output_dict=True)
    url = study.checkpoints_of(chosen.id)
    assert url == f"s3://models/export/{study.name}/{chosen.id}"
    saved = checkpoint.save(
        tmp_path / "elsewhere", Snapshot(chosen.step, model.state_dict(), {}, {})
    )
    assert export_best(study, record).model is None
    Remote(url).put(saved)
    paths = export_best(study, record)
    assert paths.model is not None and paths.warnings == ()
    loaded = open_clip.create_model(f"local-dir:{paths.model}", output_dict=True)
    assert torch.equal(loaded.visual.conv1.weight, model.visual.conv1.weight)
