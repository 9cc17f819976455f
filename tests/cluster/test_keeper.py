"""The keeper by itself: leases, imports ahead, and accelerators that are not free yet."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from ablate.cluster.contract import Attempt, GangEvent, Shape
from ablate.cluster.keeper.client import Keeper
from ablate.cluster.keeper.devices import wait_until_free
from ablate.cluster.keeper.rank import import_ahead
from ablate.cluster.keeper.wire import Ended, Rank, describe_code
from ablate.cluster.local import LocalCluster
from ablate.errors import ClusterError

HERE = Path(__file__).parents[1]


def rank_of(trial: Path) -> Rank:
    env = {"RANK": "0", "ABLATE_TRIAL": str(trial), "ABLATE_ATTEMPT": "1", "PYTHONPATH": str(HERE)}
    return Rank(0, env, str(trial / "attempts" / "1" / "log-0.txt"))


@pytest.mark.parametrize(
    ("entry", "code"), [("checkpoint_on_term", 75), ("ignore_term", -signal.SIGKILL)]
)
def test_a_lease_that_ends_costs_a_checkpoint_first(tmp_path: Path, entry: str, code: int) -> None:
    """A rank lives while the lease is renewed; when nobody renews it, it is asked to stop, and
    killed only when the grace has passed too."""

    async def live() -> tuple[float, Ended]:
        keeper = Keeper(address="127.0.0.1")
        await keeper.open()
        try:
            keeper.renew(60, grace_s=60)
            await keeper.run("g", f"cluster_entries:{entry}", [rank_of(tmp_path)])
            while not (tmp_path / "attempts" / "1" / "up-0").exists():
                await asyncio.sleep(0.01)
            grace_s = 60.0 if code == 75 else 1.0
            for _ in range(5):
                keeper.renew(0.5, grace_s=grace_s)
                await asyncio.sleep(0.2)
            last = time.monotonic()
            ended = await keeper.ended("g")
            return time.monotonic() - last, ended
        finally:
            await keeper.close()

    waited, ended = asyncio.run(live())
    assert ended.codes == {0: code} and ended.failed is None
    assert "could not hear the controller" in ended.reason
    assert (tmp_path / "attempts" / "1" / "saved").exists() == (code == 75)
    assert waited >= (0.2 if code == 75 else 1.2)


def test_importing_ahead_follows_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``module:NAME`` imports the module and every module that it lists under that name."""
    (tmp_path / "ahead_list.py").write_text("WANTED = ('ahead_one', 'ahead_two')\n")
    (tmp_path / "ahead_one.py").write_text("")
    (tmp_path / "ahead_two.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import_ahead(["ahead_list:WANTED"])
    assert {"ahead_list", "ahead_one", "ahead_two"} <= set(sys.modules)


def test_an_accelerator_in_use_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A seat is used again when no process is on its GPU, and no memory is held there that was free
    before: containers list no processes. One that stays is named after a while, an MPS server and
    a desktop are left alone."""
    tool = tmp_path / "nvidia-smi"
    users, memory = tmp_path / "users", tmp_path / "memory"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'case "$2" in *compute*) cat {users};; *) cat {memory};; esac\n'
    )
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    idle: dict[str, float] = {}

    def is_free(listed: str, used_mib: int) -> bool:
        users.write_text(listed)
        memory.write_text(f"GPU-1, {used_mib} MiB, 81559 MiB\nGPU-2, [N/A], [N/A]\n")
        try:
            asyncio.run(wait_until_free(["1", "3"], idle, timeout_s=0.0))
        except ClusterError as error:
            assert "4242, 61012 MiB" in str(error) or "61000 of 81559 MiB of GPU-1" in str(error)
            return False
        return True

    assert is_free("", 900)
    assert not is_free("4242, 61012 MiB, GPU-1\n", 61900)
    assert not is_free("", 61000)
    assert is_free("", 1900)
    assert is_free("7, 61012 MiB, GPU-1, nvidia-cuda-mps-server\n", 61000)
    assert "--id=1,3 " in (tmp_path / "asked").read_text()

    async def leaves() -> None:
        users.write_text("4242, 61012 MiB, GPU-1\n")
        waiting = asyncio.create_task(wait_until_free(["1"], idle, timeout_s=60))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        users.write_text("")
        memory.write_text("GPU-1, 950 MiB, 81559 MiB\n")
        await waiting

    asyncio.run(leaves())


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (-9, "SIGKILL"), (-77, "signal 77"), (None, "an unknown exit code")],
)
def test_exit_codes_in_words(code: int | None, words: str) -> None:
    """An exit code reads as a person would say it."""
    assert describe_code(code) == words


def test_a_gang_that_makes_no_progress_ends_and_a_slow_evaluation_does_not(
    tmp_path: Path,
) -> None:
    """A stopped rank, a hung step and a first evaluation that hangs within a batch end their gangs
    with the reason and, where a rank can still answer, the stack of each thread; an evaluation
    slower than a step goes on, and so does one whose batches end in time."""

    def start(trial: str, workers: int) -> None:
        (tmp_path / trial).mkdir()
        patience = {"ABLATE_PATIENCE_S": "2", "ABLATE_EVALUATION_PATIENCE_S": "2"}
        env = {"PYTHONPATH": str(HERE), **patience}
        gang = Shape(workers, cpus_per_worker=0.1)
        entry = f"cluster_entries:train_and_{trial}"
        cluster.start(Attempt(trial, 1, tmp_path / trial, gang, entry, env))

    with LocalCluster(num_cpus=2) as cluster:
        began = time.monotonic()
        for trial, workers in (("stop", 2), ("hang", 2), ("evaluate", 1), ("hang_evaluating", 1)):
            start(trial, workers)
        last = {}
        while len(last) < 4:
            assert time.monotonic() < began + 60
            last |= {e.trial_id: e for e in cluster.wait(1.0) if e.kind != "placed"}
    assert last["evaluate"].exit_codes == (0,)
    stopped, hung = last["stop"], last["hang"]
    assert stopped.failed_rank == 1 and "stopped by a signal" in stopped.detail
    for end in (hung, last["hang_evaluating"]):
        assert end.failed_rank == 0 and "no step or evaluation ended" in end.detail
    assert stopped.exit_codes == hung.exit_codes == (-signal.SIGKILL,) * 2
    for trial, rank in (("stop", 0), ("hang", 0), ("hang", 1), ("hang_evaluating", 0)):
        log = tmp_path / trial / "attempts" / "1" / f"log-{rank}.txt"
        assert "_wait_forever" in log.read_text()
        assert trial != "hang_evaluating" or "seven batches" in log.read_text()


def test_a_rank_collects_garbage(tmp_path: Path) -> None:
    """Its keeper does not while it imports."""
    with LocalCluster(num_cpus=1, preload=("json",)) as cluster:
        env = {"PYTHONPATH": str(HERE)}
        entry = "cluster_entries:see_collector"
        cluster.start(Attempt("trial", 1, tmp_path, Shape(1), entry, env))
        seen: list[GangEvent] = []
        while not seen or seen[-1].kind == "placed":
            seen += cluster.wait(60)
    assert seen[-1].exit_codes == (0,)


def test_a_cluster_that_ran_nothing_does_not_wait_for_its_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in the midst of them, and no process is left."""
    begun = tmp_path / "begun"
    (tmp_path / "endless.py").write_text(
        f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(900)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with LocalCluster(num_cpus=1, preload=("endless",)):
        deadline = time.monotonic() + 60
        while not begun.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any('["endless"]' in command for command in commands)


def test_imports_that_hang_lose_the_machine_and_not_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount that is away where a keeper imports from: the attempt ends as lost, with the reason
    and the variable that sets the patience."""
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(900)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ABLATE_START_PATIENCE_S", "2")
    (tmp_path / "trial").mkdir()
    with LocalCluster(num_cpus=1, preload=("endless",)) as cluster:
        attempt = Attempt("trial", 1, tmp_path / "trial", Shape(1), "cluster_entries:succeed")
        cluster.start(attempt)
        (lost,) = cluster.wait(60)
    assert lost.kind == "lost" and "its imports (endless) hang" in lost.detail
    assert "ABLATE_START_PATIENCE_S" in lost.detail


def test_what_holds_a_gang_ends_it(tmp_path: Path) -> None:
    """A rank that hangs before its first step is ended with its stacks when its patience is over;
    one that cannot go on without the others, its result written, ends the gang at once; and a log
    that cannot be read (a mount that hangs) holds neither of them up."""
    cases = {"sleep": 1, "leave_alone": 2, "hide_the_log": 1}
    with LocalCluster(num_cpus=4) as cluster:
        for entry, workers in cases.items():
            (tmp_path / entry).mkdir()
            env = {"PYTHONPATH": str(HERE), "ABLATE_START_PATIENCE_S": "4"}
            shape = Shape(workers, cpus_per_worker=0.1)
            name = f"cluster_entries:{entry}"
            cluster.start(Attempt(entry, 1, tmp_path / entry, shape, name, env))
        last: dict[str, GangEvent] = {}
        began = time.monotonic()
        while len(last) < 3:
            assert time.monotonic() < began + 60, last
            last |= {e.trial_id: e for e in cluster.wait(1.0) if e.kind != "placed"}
    assert "did not come to its first step" in last["sleep"].detail
    assert "ABLATE_START_PATIENCE_S" in last["sleep"].detail
    assert "_wait_forever" in (tmp_path / "sleep" / "attempts" / "1" / "log-0.txt").read_text()
    assert last["leave_alone"].exit_codes == (-signal.SIGKILL, 73)
    assert last["hide_the_log"].exit_codes == (3,)
