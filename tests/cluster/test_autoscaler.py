"""A Ray that starts with no node for trials, and an autoscaler that brings them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)

from ablate.cluster.contract import Attempt, GangEvent, Shape
from ablate.cluster.ray_cluster import RayCluster
from ablate.cluster.ray_doors import INSECURE

HERE = Path(__file__).parents[1]
PROVIDER = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__qualname__}"
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # a minute, most of it Ray's own
EMPTY = (
    *("auth", "file_mounts", "docker"),
    *("cluster_synced_files", "setup_commands", "initialization_commands", "rsync_exclude"),
    *("rsync_filter", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)


@contextmanager
def autoscaled(folder: Path, *, most: int) -> Iterator[str]:
    """The address of a Ray whose autoscaler starts up to `most` nodes of one CPU, as processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    provider = {
        # As one of Ray's own kinds it would read a file of defaults that the wheel lacks.
        "type": "external", "module": PROVIDER, "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True, "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": f"127.0.0.1:{port}",
    }  # fmt: skip
    config = {
        **{name: {} if name in EMPTY[:3] else [] for name in EMPTY},
        "cluster_name": "fake", "max_workers": most, "idle_timeout_minutes": 5,
        "upscaling_speed": 1000, "provider": provider, "head_node_type": "ray.head.default",
        "available_node_types": {
            "worker": {
                "resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most,
            },
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        "file_mounts_sync_continuously": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled",
        "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    ray += ["--num-cpus=0", "--num-gpus=0", f"--port={port}", "--node-ip-address=127.0.0.1"]
    ray += ["--include-dashboard=false", f"--temp-dir=/tmp/ablate-as{port}"]
    ray += ["--object-store-memory=80000000", f"--autoscaling-config={folder / 'config.json'}"]
    with open(folder / "ray.log", "wb") as log:
        head = subprocess.Popen(ray, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while b"Ray runtime started" not in (folder / "ray.log").read_bytes():
            assert head.poll() is None and time.monotonic() < end, (folder / "ray.log").read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(f"/tmp/ablate-as{port}", ignore_errors=True)


def test_an_autoscaled_ray_grows_from_nothing_and_by_several_gangs_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no node that could hold a gang none is refused: the autoscaler is asked for all at
    once, and two gangs that wait for each other run side by side on nodes that it brought."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv(INSECURE, "1")
    go = tmp_path / "go"
    env = {"PYTHONPATH": str(HERE), "GO": str(go)}
    with autoscaled(tmp_path, most=2) as address, RayCluster(address) as cluster:
        end = time.monotonic() + 60
        while not (room := cluster.capacity(Shape(workers=1))).total:
            assert time.monotonic() < end, "no autoscaler is seen"
            time.sleep(0.5)
        assert room.free == 0 and room.away == room.total > 1
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            cluster.start(
                Attempt(
                    name, 1, tmp_path / name, Shape(workers=1), "cluster_entries:wait_for_file", env
                )
            )
        events: list[GangEvent] = []
        while sum(event.kind == "placed" for event in events) < 2:  # a node holds one
            assert time.monotonic() < end + 120, events
            events += cluster.wait(1.0)
        go.touch()
        while sum(event.kind == "exited" for event in events) < 2:
            assert time.monotonic() < end + 180, events
            events += cluster.wait(1.0)
    assert all(event.exit_codes == (0,) for event in events if event.kind == "exited")
