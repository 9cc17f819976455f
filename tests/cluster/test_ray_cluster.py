"""What only the Ray cluster has: its door, its accelerators, its hold on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from ablate.cluster.contract import Attempt, GangEvent, Shape
from ablate.cluster.ray_cluster import RayCluster
from ablate.cluster.ray_doors import INSECURE, refuse_open_door
from ablate.cluster.ray_nodes import FORGET_S, Nodes
from ablate.errors import ClusterError, PlacementError

HERE = Path(__file__).parents[1]
TOKEN_FILE = Path.home() / ".ray" / "auth_token"
HAD_TOKEN_FILE = TOKEN_FILE.exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A private Ray that believes in four GPUs."""
    with RayCluster(num_cpus=4, num_gpus=4, preload=()) as made:
        yield made


@pytest.mark.parametrize(
    "credentials",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32},
    ],
)
def test_a_stranger_on_this_machine_is_turned_away(
    cluster: RayCluster, credentials: dict[str, str]
) -> None:
    """Who reaches the port of a private Ray without its token, or with another, gets nothing."""
    address = ray.get_runtime_context().gcs_address
    attack = (
        "from ray._raylet import GcsClient\n"
        f"print(GcsClient(address={address!r}).internal_kv_keys(b'', None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", attack],
        env={**os.environ, **credentials},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "InvalidAuthToken" in done.stderr and done.stdout == ""


def test_a_private_ray_listens_on_loopback_and_shows_no_dashboard(cluster: RayCluster) -> None:
    """Every port of every process of a private Ray is on loopback, and none is a dashboard's."""
    processes = psutil.Process().children(recursive=True)
    listening = [
        (process.name(), connection.laddr)
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening, "Ray listens somewhere"
    assert {address.ip for _, address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    # Ray keeps a process of that name for other work; it has no page and no port.
    dashboards = [p for p in processes if "dashboard/dashboard.py" in " ".join(p.cmdline())]
    assert all("--disable-frontend" in p.cmdline() for p in dashboards)
    assert not any(
        connection.status == psutil.CONN_LISTEN
        for process in dashboards
        for connection in process.net_connections(kind="inet")
    )


def test_the_token_stays_with_ray(cluster: RayCluster) -> None:
    """A private Ray leaves no token in the controller's environment or home folder."""
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert TOKEN_FILE.exists() == HAD_TOKEN_FILE


@pytest.mark.parametrize("address", ["10.0.0.5:6379", "[fd00::2]:6379"])
def test_an_open_ray_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """A Ray beyond this machine is joined with a token, or when somebody insists; else refused."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN"):
        refuse_open_door(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    refuse_open_door(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv(INSECURE, "1")
    refuse_open_door(address)


def test_loopback_needs_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray on loopback may be joined as it is."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    refuse_open_door("127.0.0.1:6379")
    refuse_open_door("[::1]:6379")


def test_one_ray_per_process(cluster: RayCluster) -> None:
    """A second cluster in one process is refused before it touches the first."""
    with pytest.raises(ClusterError, match="already"):
        RayCluster(num_cpus=1)
    assert cluster.capacity(Shape(workers=1)).total == 4


def test_machines_that_went_away_are_told_apart(cluster: RayCluster) -> None:
    """What only fits with a machine that no longer answers counts as away, and not as free."""
    nodes, shape = Nodes(), Shape(workers=6)
    assert nodes.capacity(shape, []).total == 0
    nodes.note({"gone": machine("gone")}, now=time.monotonic())
    room = nodes.capacity(shape, [])
    assert (room.total, room.free, room.away, room.reason) == (1, 0, 1, "")
    assert "4 CPU free: 4 of 6 workers, CPU runs out" in room.busy and "gone" not in room.busy
    assert nodes.capacity(Shape(workers=2), []).away == 2


def machine(host: str, cpus: float = 4.0) -> dict[str, Any]:
    return {"Resources": {"CPU": cpus}, "NodeManagerHostname": host}


def test_a_node_that_went_is_expected_back_only_for_a_while() -> None:
    """One that comes in its place stands in for it, and what stays away is forgotten."""
    nodes, shape = Nodes(), Shape(workers=1, cpus_per_worker=4)
    fixed = {"a": machine("a"), "b": machine("b", 64.0)}
    nodes.note({**fixed, "day0": machine("spot")}, now=0.0)
    for day in range(1, 6):
        nodes.note({**fixed, f"day{day}": machine("spot")}, now=86_400.0 * day)
        assert nodes.total(shape) == 1 + 16 + 1
    nodes.note(fixed, now=86_400.0 * 5 + FORGET_S / 2)
    assert nodes.total(shape) == 1 + 16 + 1
    nodes.note({"a": machine("a")}, now=86_400.0 * 5 + FORGET_S + 1)
    assert nodes.total(shape) == 1 + 16  # b was seen half that time ago
    nodes.note({"a": machine("a")}, now=86_400.0 * 5 + 2 * FORGET_S)
    assert nodes.total(shape) == 1 and nodes.name("a") == "a"


def test_a_launch_depends_on_its_own_node_and_on_that_of_the_head(cluster: RayCluster) -> None:
    """They are told apart, where they are two; a node without CPUs holds no seat."""
    nodes = Nodes()
    (here,) = nodes.look()
    assert nodes.home(here) == {here: "this launch runs on it"}, "of a private Ray both"
    assert nodes.holds_seats(here)
    nodes.note({**ray_facts(), "door": machine("door", 0.0)}, now=time.monotonic())
    assert nodes.home("door") == {here: "Ray's head is on it", "door": "this launch runs on it"}
    assert not nodes.holds_seats("door")


def ray_facts() -> dict[str, Any]:
    return {node["NodeID"]: node for node in ray.nodes()}


def test_labels_keep_a_gang_to_nodes_that_have_them(cluster: RayCluster, tmp_path: Path) -> None:
    """Nodes without the label hold none of its gangs; where no node has it, that is said; without
    labels, accelerators of several kinds are worth a note. Ray is asked in the same words."""
    nodes = Nodes()
    kinds = {"a": "A100", "b": "H100"}
    nodes.note(
        {
            name: {**machine(name), "Labels": {"ray.io/accelerator-type": kind}}
            | {"Resources": {"CPU": 8.0, "GPU": 4.0}}
            for name, kind in kinds.items()
        },
        now=time.monotonic(),
    )
    any_kind = Shape(workers=2, gpus_per_worker=1)
    one_kind = replace(any_kind, labels=(("ray.io/accelerator-type", "H100"),))
    none = replace(any_kind, labels=(("rack", "7"),))
    assert [nodes.total(shape) for shape in (any_kind, one_kind, none)] == [4, 2, 0]
    assert "A100 or H100" in nodes.capacity(any_kind, []).notes[0]
    assert nodes.capacity(one_kind, []).notes == ()
    assert "rack=7, but the cluster has no machine with these labels" in (
        nodes.capacity(none, []).reason
    )
    nodes.look_for_autoscaler()
    assert not nodes.grows, "a private Ray has none"
    (node,) = ray.nodes()
    mine = Shape(workers=1, labels=(("ray.io/node-id", node["NodeID"]),))
    (tmp_path / "trial").mkdir()
    env = {"PYTHONPATH": str(HERE)}
    cluster.start(Attempt("trial", 1, tmp_path / "trial", mine, "cluster_entries:succeed", env))
    events: list[GangEvent] = []
    while not events or events[-1].kind == "placed":
        events += cluster.wait(60)
    assert events[-1].exit_codes == (0,)
    with pytest.raises(PlacementError, match="rack=7"):
        cluster.start(Attempt("other", 1, tmp_path / "trial", none))


def test_gangs_hold_accelerators_of_their_own(cluster: RayCluster, tmp_path: Path) -> None:
    """Gangs side by side see different whole GPUs, and a group that is reused keeps its own. While
    ours hold all seats none is free, which is nobody's shortage."""
    go = tmp_path / "go"
    seen: dict[int, list[str]] = {}
    for number in (1, 2):
        runs = []
        for trial in "ab":
            folder = tmp_path / trial
            folder.mkdir(exist_ok=True)
            env = {"PYTHONPATH": str(HERE), "GO": str(go)}
            runs.append(
                Attempt(
                    trial,
                    number,
                    folder,
                    Shape(workers=2, gpus_per_worker=1),
                    "cluster_entries:write_environment_and_wait",
                    env,
                )
            )
            cluster.start(runs[-1])
        events: list[GangEvent] = []
        while sum(event.kind == "placed" for event in events) < 2:
            events += cluster.wait(60)
        room = cluster.capacity(runs[0].shape)
        assert (room.total, room.free, room.ours) == (2, 0, True)
        go.touch()
        while sum(event.kind == "exited" for event in events) < 2:
            events += cluster.wait(60)
        go.unlink()
        assert all(event.exit_codes == (0, 0) for event in events if event.kind == "exited")
        files = [run.folder / "attempts" / str(number) / "env-1.json" for run in runs]
        seen[number] = [json.loads(file.read_text())["CUDA_VISIBLE_DEVICES"] for file in files]
    assert sorted(",".join(seen[1]).split(",")) == ["0", "1", "2", "3"]
    assert set(seen[1]) == set(seen[2])


def test_a_killed_agent_takes_its_ranks_along(cluster: RayCluster, tmp_path: Path) -> None:
    """When Ray's actor on a node dies the gang is lost, all it started is gone, the next runs."""
    env = {"PYTHONPATH": str(HERE)}
    gang = Shape(workers=1)
    cluster.start(Attempt("a", 1, tmp_path, gang, "cluster_entries:breed_and_sleep", env))
    (placed,) = cluster.wait(60)
    bred = tmp_path / "attempts" / "1" / "pids-0.json"
    end = time.monotonic() + 60
    while not bred.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    pids = [*placed.pids, *json.loads(bred.read_text())]
    waiter = psutil.Process(placed.pids[0]).parent().parent()
    waiter.parent().kill()
    killed = time.monotonic()
    (lost,) = cluster.wait(60)
    assert lost.kind == "lost" and lost.exit_codes == (None,)
    print(f"noticed after {time.monotonic() - killed:.2f} s")
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < killed + 30
        time.sleep(0.01)
    cluster.start(Attempt("a", 2, tmp_path, gang, "cluster_entries:succeed", env))
    events: list[GangEvent] = []
    while not events or events[-1].kind == "placed":
        events += cluster.wait(60)
    assert events[-1].exit_codes == (0,)


def test_ray_client_is_refused() -> None:
    """An address of Ray Client, which cannot hold placement groups for us, says what to use."""
    program = (
        "from ablate.cluster.ray_cluster import RayCluster\n"
        "from ablate.errors import ClusterError\n"
        "try: RayCluster('ray://127.0.0.1:10001')\n"
        "except ClusterError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "host:port" in said
