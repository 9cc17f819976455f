"""The Cluster contract, run with real processes over every implementation."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ablate.cluster.contract import Attempt, Cluster, GangEvent, Shape
from ablate.cluster.local import LocalCluster
from ablate.cluster.seats import count_gangs
from ablate.errors import ClusterError, PlacementError
from ablate.testing import ClusterContract

HERE = Path(__file__).parents[1]
CPUS = 3
DEADLINE_S = 60.0


def local() -> Cluster:
    return LocalCluster(num_cpus=CPUS)


def ray() -> Cluster:
    from ablate.cluster.ray_cluster import RayCluster

    return RayCluster(num_cpus=CPUS, preload=())


@pytest.fixture(scope="module", params=[local, ray])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One cluster of 3 CPUs for all tests, made by a thread that does not outlive its making."""
    others = set(psutil.Process().children(recursive=True))  # of other test files
    made: list[Cluster] = []
    maker = threading.Thread(target=lambda: made.append(request.param()))
    maker.start()
    maker.join()
    its_own = set(psutil.Process().children(recursive=True)) - others
    yield made[0]
    made[0].close()
    assert not [process for process in its_own if process.is_running()]


@pytest.fixture(autouse=True)
def idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves the shared cluster empty, also when it fails."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        for trial in cluster.pids():
            cluster.stop(trial, grace_s=0)
        until(lambda: not cluster.pids())
        cluster.wait(0)


def until(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition; the deadline is for a loaded machine."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


def attempt(
    folder: Path,
    entry: str,
    *,
    trial: str = "a",
    number: int = 1,
    workers: int = 2,
    cpus: float = 1.0,
    **env: str,
) -> Attempt:
    trial_folder = folder / trial
    trial_folder.mkdir(exist_ok=True)
    return Attempt(
        trial_id=trial,
        number=number,
        folder=trial_folder,
        shape=Shape(workers=workers, cpus_per_worker=cpus),
        entry=entry if ":" in entry else f"cluster_entries:{entry}",
        env={"PYTHONPATH": str(HERE), **env},
    )


def follow(cluster: Cluster, *trials: str) -> list[GangEvent]:
    """All events until the last one of each trial."""
    events: list[GangEvent] = []
    open_trials = set(trials)
    end = time.monotonic() + DEADLINE_S
    while open_trials:
        assert time.monotonic() < end, f"no last event of {open_trials}; so far: {events}"
        new = cluster.wait(1.0)
        events += new
        open_trials -= {event.trial_id for event in new if event.kind != "placed"}
    return events


def placed(cluster: Cluster) -> GangEvent:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        for event in cluster.wait(1.0):
            assert event.kind == "placed", event
            return event
    raise AssertionError("nothing was placed")


def said(run: Attempt, name: str) -> Path:
    return run.folder / "attempts" / str(run.number) / name


def is_up(run: Attempt) -> bool:
    return all(said(run, f"up-{rank}").exists() for rank in range(run.shape.workers))


def bred(run: Attempt) -> list[int]:
    """The processes that the ranks started, once all of them are there."""
    files = [said(run, f"pids-{rank}.json") for rank in range(run.shape.workers)]
    until(lambda: all(file.exists() for file in files))
    return [pid for file in files for pid in json.loads(file.read_text())]


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


class TestEach(ClusterContract):
    """The cluster of this machine and Ray's."""


def test_an_attempt_is_placed_and_then_ends_once(cluster: Cluster, tmp_path: Path) -> None:
    """An attempt tells "placed" with a process per rank, then "exited" with every exit code."""
    run = attempt(tmp_path, "succeed")
    cluster.start(run)
    first, last = follow(cluster, "a")
    assert (first.kind, last.kind) == ("placed", "exited")
    assert len(set(first.pids)) == 2 and len(first.nodes) == 2 and first.exit_codes == ()
    assert last.exit_codes == (0, 0) and last.failed_rank is None and not last.stopped
    assert last.pids == first.pids and gone(list(last.pids))
    assert [run.log_of(rank).read_text() for rank in (0, 1)] == ["done\n", "done\n"]
    assert cluster.wait(0) == []


def test_ranks_know_their_place_from_the_environment(cluster: Cluster, tmp_path: Path) -> None:
    """A rank finds its gang, trial and thread count in the environment, and no Ray secret."""
    run = attempt(tmp_path, "write_environment", number=7, cpus=1.5, COLOUR="blue")
    cluster.start(run)
    follow(cluster, "a")
    envs = [json.loads(said(run, f"env-{rank}.json").read_text()) for rank in (0, 1)]
    for rank, env in enumerate(envs):
        assert env["RANK"] == env["LOCAL_RANK"] == str(rank)
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == "2"
        assert env["ABLATE_TRIAL"] == str(run.folder) and env["ABLATE_ATTEMPT"] == "7"
        assert ipaddress.ip_address(env["MASTER_ADDR"]).is_loopback
        assert env["OMP_NUM_THREADS"] == "1" and env["COLOUR"] == "blue"
        assert env["CUDA_VISIBLE_DEVICES"] == ""
        assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
        assert not [name for name in env if name.startswith("RAY_")]
    assert envs[0]["MASTER_PORT"] == envs[1]["MASTER_PORT"]
    assert "ABLATE_STORE_FD" in envs[0] and "ABLATE_STORE_FD" not in envs[1]


def test_ranks_meet_over_the_store_that_was_opened_for_them(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Ranks all-reduce over the listening socket rank 0 was given; only loopback listens."""
    run = attempt(tmp_path, "all_reduce")
    cluster.start(run)
    last = follow(cluster, "a")[-1]
    assert last.exit_codes == (0, 0), (last, run.log_of(0).read_text(), run.log_of(1).read_text())
    for rank in (0, 1):
        result = json.loads(said(run, f"sum-{rank}.json").read_text())
        assert result["sum"] == 3.0 and result["threads"] == 1
        assert result["listening"]
        assert all(ipaddress.ip_address(address).is_loopback for address in result["listening"])


def test_nothing_listens_beyond_this_machine(cluster: Cluster, tmp_path: Path) -> None:
    """While a gang runs, every port of the cluster's processes is on the loopback interface."""
    run = attempt(tmp_path, "sleep")
    cluster.start(run)
    until(lambda: is_up(run))
    listening = {
        (process.name(), connection.laddr.ip)
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening  # at least the store of rank 0
    addresses = [ipaddress.ip_address(ip.removeprefix("::ffff:")) for _, ip in listening]
    assert all(address.is_loopback for address in addresses), listening


def test_a_full_cluster_queues_in_order(cluster: Cluster, tmp_path: Path) -> None:
    """What does not fit waits, and a narrow gang never overtakes a wide one that waits longer."""
    go = tmp_path / "go"
    wide = [attempt(tmp_path, "wait_for_file", trial=t, GO=str(go)) for t in ("a", "b")]
    narrow = attempt(tmp_path, "succeed", trial="c", workers=1)
    assert cluster.capacity(narrow.shape).total == 3
    until(lambda: cluster.capacity(narrow.shape).free == 3)
    cluster.start(wide[0])
    assert placed(cluster).trial_id == "a"
    cluster.start(wide[1])
    cluster.start(narrow)
    until(lambda: is_up(wide[0]))
    until(lambda: cluster.capacity(wide[1].shape).free == 0)
    assert cluster.wait(0.5) == []
    go.touch()
    events = follow(cluster, "a", "b", "c")
    starts = [event.trial_id for event in events if event.kind == "placed"]
    assert starts == ["b", "c"]
    assert all(event.exit_codes == (0,) * len(event.nodes) for event in events if event.exit_codes)
    until(lambda: cluster.capacity(narrow.shape).free == 3)


def test_gangs_are_never_half_placed(cluster: Cluster, tmp_path: Path) -> None:
    """Four gangs of 2 compete for 3 seats: each runs with both ranks, one after another."""
    runs = [attempt(tmp_path, "record_interval", trial=t) for t in "abcd"]
    for run in runs:
        cluster.start(run)
    events = follow(cluster, *"abcd")
    assert all(event.exit_codes == (0, 0) for event in events if event.kind == "exited")
    spans = [
        [json.loads(said(run, f"interval-{rank}.json").read_text()) for rank in (0, 1)]
        for run in runs
    ]
    for earlier, later in zip(spans, spans[1:], strict=False):
        assert max(end for _, end in earlier) <= min(begin for begin, _ in later)


def test_stopping_lets_ranks_save(cluster: Cluster, tmp_path: Path) -> None:
    """stop() sends SIGTERM, and a rank that ended in order does not cost another its last write."""
    run = attempt(tmp_path, "checkpoint_on_term")
    cluster.start(run)
    until(lambda: is_up(run))
    cluster.stop("a", grace_s=DEADLINE_S)
    last = follow(cluster, "a")[-1]
    assert last.exit_codes == (75, 75) and last.stopped and last.failed_rank is None
    assert said(run, "saved").exists()


def test_a_rank_that_ignores_sigterm_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    """After the grace a rank that ignored SIGTERM leaves its stack in its log and is killed."""
    run = attempt(tmp_path, "ignore_term")
    cluster.start(run)
    until(lambda: is_up(run))
    asked = time.monotonic()
    cluster.stop("a", grace_s=1.0)
    last = follow(cluster, "a")[-1]
    assert time.monotonic() - asked >= 1.0
    assert last.exit_codes == (-signal.SIGKILL,) * 2 and last.stopped and gone(list(last.pids))
    assert "_wait_forever" in run.log_of(0).read_text()


def test_a_stopped_rank_process_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    """A rank under SIGSTOP cannot hold its gang's seat: the grace ends it too."""
    run = attempt(tmp_path, "sleep")
    cluster.start(run)
    until(lambda: is_up(run))
    os.kill(placed(cluster).pids[1], signal.SIGSTOP)
    cluster.stop("a", grace_s=0.5)
    last = follow(cluster, "a")[-1]
    assert last.exit_codes[1] in (-signal.SIGKILL, -signal.SIGTERM) and gone(list(last.pids))


def test_a_second_stop_shortens_the_grace(cluster: Cluster, tmp_path: Path) -> None:
    """stop() again with no grace ends at once what was given an hour."""
    run = attempt(tmp_path, "ignore_term")
    cluster.start(run)
    until(lambda: is_up(run))
    cluster.stop("a", grace_s=3600)
    cluster.stop("a", grace_s=0)
    assert follow(cluster, "a")[-1].exit_codes == (-signal.SIGKILL,) * 2


@pytest.mark.parametrize("entry", ["breed_and_sleep", "breed_and_return"])
def test_nothing_that_a_rank_started_survives_it(
    cluster: Cluster, tmp_path: Path, entry: str
) -> None:
    """Children, forks, orphans and daemons of ranks are gone at the last event, stopped or not."""
    run = attempt(tmp_path, entry)
    cluster.start(run)
    pids = bred(run)
    assert len(set(pids)) == 8
    if entry == "breed_and_sleep":
        assert all(psutil.pid_exists(pid) for pid in pids)
        cluster.stop("a", grace_s=0.5)
    follow(cluster, "a")
    assert gone(pids)


def test_a_crash_ends_the_gang(cluster: Cluster, tmp_path: Path) -> None:
    """When one rank fails the others are killed at once, and the event says which rank and why."""
    run = attempt(tmp_path, "crash_rank_1")
    cluster.start(run)
    last = follow(cluster, "a")[-1]
    assert last.kind == "exited" and last.failed_rank == 1
    assert last.exit_codes == (-signal.SIGKILL, 3)
    assert "rank 1" in last.detail and "exit code 3" in last.detail
    assert str(run.log_of(1)) in last.detail and "about to fail" in last.detail


@pytest.mark.parametrize(
    ("entry", "last_line"),
    [("crash", "no such augmentation"), ("no_such_module:main", "No module named")],
)
def test_a_crash_leaves_its_traceback(
    cluster: Cluster, tmp_path: Path, entry: str, last_line: str
) -> None:
    """An exception, even while the entry is imported, is in the rank's log and in the event."""
    run = attempt(tmp_path, entry, workers=1)
    cluster.start(run)
    last = follow(cluster, "a")[-1]
    assert last.exit_codes == (1,) and last_line in last.detail
    assert "Traceback" in run.log_of(0).read_text()


def test_a_queued_attempt_can_be_stopped(cluster: Cluster, tmp_path: Path) -> None:
    """An attempt that waits for seats is taken out of the queue, and the next one moves up."""
    go = tmp_path / "go"
    first, second = (attempt(tmp_path, "wait_for_file", trial=t, GO=str(go)) for t in "ab")
    cluster.start(first)
    placed(cluster)
    cluster.start(second)
    cluster.stop("b", grace_s=DEADLINE_S)
    (event,) = follow(cluster, "b")
    assert event.kind == "exited" and event.stopped
    assert event.exit_codes == (None, None) and event.pids == ()
    go.touch()
    assert follow(cluster, "a")[-1].exit_codes == (0, 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_attempt_has_one_last_event_whenever_it_is_stopped(
    cluster: Cluster, tmp_path: Path, seed: int
) -> None:
    """Starts and stops at random moments: each attempt ends once, and all seats come back."""
    draw = random.Random(seed)
    runs = [
        attempt(
            tmp_path,
            draw.choice(["succeed", "sleep"]),
            trial=f"t{number}",
            workers=draw.choice([1, 2, 3]),
        )
        for number in range(12)
    ]
    last: dict[str, GangEvent] = {}
    pids: list[int] = []
    for run in runs:
        cluster.start(run)
        if draw.random() < 0.5:
            cluster.stop(draw.choice(runs[: runs.index(run) + 1]).trial_id, grace_s=0)
    end = time.monotonic() + DEADLINE_S
    while len(last) < len(runs):
        assert time.monotonic() < end, last
        for event in cluster.wait(draw.random() * 0.1):
            pids += event.pids
            if event.kind != "placed":
                assert event.trial_id not in last
                last[event.trial_id] = event
        cluster.stop(draw.choice(runs).trial_id, grace_s=draw.choice([0, 0.05]))
    assert all(event.kind == "exited" for event in last.values()), last
    assert gone(pids) and cluster.pids() == {}
    until(lambda: cluster.capacity(Shape(workers=3)).free == 1)


@pytest.mark.parametrize(
    ("shape", "missing"),
    [
        (Shape(workers=4), "3 CPU: 3 of 4 workers, CPU runs out"),
        (Shape(workers=1, gpus_per_worker=2), "0 GPU: 0 of 1 workers, GPU runs out"),
        (Shape(workers=2, strategy="STRICT_SPREAD"), "each on a machine of its own"),
    ],
)
def test_a_gang_that_can_never_be_placed_is_refused(
    cluster: Cluster, tmp_path: Path, shape: Shape, missing: str
) -> None:
    """start() names the missing resource and the machine; capacity() says the same."""
    capacity = cluster.capacity(shape)
    assert capacity.total == capacity.free == 0 and missing in capacity.reason
    with pytest.raises(PlacementError, match=missing):
        cluster.start(Attempt(trial_id="a", number=1, folder=tmp_path, shape=shape))


def test_a_missing_trial_folder_is_told(cluster: Cluster, tmp_path: Path) -> None:
    """A machine that does not see the study folder says so instead of making one of its own."""
    folder = tmp_path / "unmounted"
    cluster.start(Attempt(trial_id="a", number=1, folder=folder, shape=Shape(workers=2)))
    last = follow(cluster, "a")[-1]
    assert last.kind == "lost" and str(folder) in last.detail and "every node" in last.detail
    assert not folder.exists()


def test_a_dead_keeper_is_noticed_and_replaced(cluster: Cluster, tmp_path: Path) -> None:
    """When the process that holds the ranks is killed the gang is lost, and the next one runs."""
    run = attempt(tmp_path, "breed_and_sleep")
    cluster.start(run)
    event = placed(cluster)
    pids = bred(run)
    keeper = psutil.Process(event.pids[0]).parent()
    assert keeper is not None
    keeper.kill()
    killed = time.monotonic()
    last = follow(cluster, "a")[-1]
    assert last.kind == "lost" and last.exit_codes == (None, None) and "SIGKILL" in last.detail
    assert time.monotonic() - killed < 30.0
    # All but the daemons: they left their rank's session, and their keeper was not given the
    # time to kill them.
    daemons = [pids[2], pids[6]]
    until(lambda: gone([pid for pid in pids if pid not in daemons]))
    for pid in daemons:
        os.kill(pid, signal.SIGKILL)
    cluster.start(attempt(tmp_path, "succeed", number=2))
    assert follow(cluster, "a")[-1].exit_codes == (0, 0)


def test_the_next_attempt_starts_warm(
    cluster: Cluster, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A second attempt runs in fresh processes of the same keeper; the latency is reported."""
    cluster.start(attempt(tmp_path, "write_environment"))
    first = follow(cluster, "a")
    asked = time.time()
    cluster.start(attempt(tmp_path, "write_environment", number=2))
    second = follow(cluster, "a")
    assert not set(first[0].pids) & set(second[0].pids)
    record_property("start_to_placed_s", round(second[0].time - asked, 4))
    record_property("start_to_exited_s", round(second[-1].time - asked, 4))
    print(f"placed {second[0].time - asked:.4f} s, exited {second[-1].time - asked:.4f} s")


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_a_killed_controller_leaves_nothing(kind: str, tmp_path: Path) -> None:
    """SIGKILL of the controller takes ranks, their children, daemons, keepers and Ray with it."""
    (tmp_path / "t").mkdir()
    run = attempt(tmp_path, "breed_and_sleep", trial="t")
    with subprocess.Popen(
        [sys.executable, str(HERE / "cluster_driver.py"), kind, str(run.folder), run.entry],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    ) as driver:
        try:
            assert driver.stdout is not None
            ranks = json.loads(driver.stdout.readline())
            pids = [*ranks, *bred(run)]
            tree = psutil.Process(driver.pid).children(recursive=True)
            assert set(pids) <= {process.pid for process in tree}
            folders = list(Path(tempfile.gettempdir()).glob(f"ablate-ray-{driver.pid}-*"))
            assert len(folders) == (kind == "ray")
        finally:
            driver.kill()
    with contextlib.suppress(AssertionError):
        until(lambda: not any(process.is_running() for process in tree), 20)
    assert not [process for process in tree if process.is_running()]
    assert not [folder for folder in folders if folder.exists()]


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_ctrl_c_reaches_the_controller_alone(kind: str, tmp_path: Path) -> None:
    """Ctrl-C in a terminal, which hits every process of the job, lets ranks save and end."""
    (tmp_path / "t").mkdir()
    run = attempt(tmp_path, "checkpoint_on_term", trial="t")
    with subprocess.Popen(
        [sys.executable, str(HERE / "cluster_driver.py"), kind, str(run.folder), run.entry],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        process_group=0,
    ) as driver:
        try:
            assert driver.stdout is not None
            driver.stdout.readline()
            until(lambda: is_up(run))
            tree = psutil.Process(driver.pid).children(recursive=True)
            os.killpg(driver.pid, signal.SIGINT)
            assert json.loads(driver.stdout.readline()) == [75, 75]
            assert driver.wait(DEADLINE_S) == 0
        finally:
            driver.kill()
    assert said(run, "saved").exists()
    until(lambda: not any(process.is_running() for process in tree))


def test_importing_ahead_that_fails_is_told(tmp_path: Path) -> None:
    """An error in a module to import ahead comes with its traceback, not as a silent slow start."""
    with LocalCluster(num_cpus=1, preload=("json", "no_such_module")) as cluster:
        cluster.start(attempt(tmp_path, "succeed", workers=1))
        last = follow(cluster, "a")[-1]
    assert last.kind == "lost" and "ModuleNotFoundError" in last.detail
    assert "no_such_module" in last.detail


def test_closing_stops_what_runs_and_refuses_more(tmp_path: Path) -> None:
    """close() gives running gangs their grace, ends the rest, and refuses what comes after."""
    outside = set(psutil.Process().children(recursive=True))
    cluster = LocalCluster(num_cpus=3)
    saves = attempt(tmp_path, "checkpoint_on_term", trial="a")
    waits = attempt(tmp_path, "sleep", trial="b")
    cluster.start(saves)
    cluster.start(waits)
    until(lambda: is_up(saves))
    ours = set(psutil.Process().children(recursive=True)) - outside
    cluster.close(grace_s=DEADLINE_S)
    assert said(saves, "saved").exists()
    assert ours and not [process for process in ours if process.is_running()]
    events = {event.trial_id: event for event in cluster.wait(0) if event.kind == "exited"}
    assert events["a"].exit_codes == (75, 75) and events["b"].exit_codes == (None, None)
    with pytest.raises(ClusterError, match="closed"):
        cluster.start(attempt(tmp_path, "succeed", trial="c"))
    cluster.close()


def test_accelerators_are_handed_out_whole(tmp_path: Path) -> None:
    """Gangs that run together see different accelerators, each rank its gang's in rank order."""
    runs = []
    with LocalCluster(num_cpus=4, num_gpus=4) as cluster:
        for trial in "ab":
            run = attempt(tmp_path, "write_environment", trial=trial)
            gang = Shape(workers=2, gpus_per_worker=1)
            runs.append(Attempt(trial, 1, run.folder, gang, run.entry, run.env))
            cluster.start(runs[-1])
        assert cluster.capacity(gang).total == 2
        follow(cluster, *"ab")
    seen = [
        json.loads(said(run, f"env-{rank}.json").read_text())["CUDA_VISIBLE_DEVICES"]
        for run in runs
        for rank in (0, 1)
    ]
    assert seen == ["0,1", "0,1", "2,3", "2,3"]


@pytest.mark.parametrize(("visible", "there"), [("", 0), ("3", 1), ("GPU-a,GPU-b", 2)])
def test_a_local_cluster_has_the_accelerators_that_it_may_use(
    monkeypatch: pytest.MonkeyPatch, visible: str, there: int
) -> None:
    """An empty CUDA_VISIBLE_DEVICES shows none, and is not taken for all."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with LocalCluster(num_cpus=4, num_gpus=None) as cluster:
        assert cluster.capacity(Shape(workers=1, gpus_per_worker=1)).total == there
    with pytest.raises(ClusterError, match=f"shows {there}"):
        LocalCluster(num_gpus=there + 1)


@pytest.mark.parametrize("seed", range(20))
def test_counting_gangs_agrees_with_placing_them(seed: int) -> None:
    """The number of gangs that fit equals what greedy placement of real seats reaches."""
    draw = random.Random(seed)
    machines = [{"CPU": draw.randint(0, 9), "GPU": draw.randint(0, 4)} for _ in range(4)]
    workers = draw.randint(1, 4)
    for strategy in ("PACK", "STRICT_PACK", "STRICT_SPREAD"):
        gang = Shape(workers=workers, cpus_per_worker=2, gpus_per_worker=1, strategy=strategy)
        seats = [min(int(m["CPU"]) // 2, int(m["GPU"])) for m in machines]
        gangs = 0
        while True:
            seats.sort(reverse=True)
            if strategy == "STRICT_PACK":
                share = [workers, 0, 0, 0]
            elif strategy == "STRICT_SPREAD":
                share = [1] * workers + [0] * (4 - workers)
            else:
                left, share = workers, []
                for n in seats:
                    share.append(min(n, left))
                    left -= share[-1]
                if left:
                    break
            if any(take > n for take, n in zip(share, seats, strict=True)):
                break
            seats = [n - take for take, n in zip(share, seats, strict=True)]
            gangs += 1
        assert count_gangs(gang, machines) == gangs


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"workers": 0}, "gang.workers is 0"),
        ({"workers": 1, "cpus_per_worker": 0}, "gang.cpus_per_worker is 0"),
        ({"workers": 1, "gpus_per_worker": -1}, "gang.gpus_per_worker is -1"),
        ({"workers": 1, "strategy": "TIGHT"}, "PACK, SPREAD"),
    ],
)
def test_an_impossible_gang_is_refused(wrong: dict[str, object], named: str) -> None:
    """A gang says which field is wrong and what is allowed."""
    with pytest.raises(ValueError, match=named):
        Shape(**wrong)  # type: ignore[arg-type]
