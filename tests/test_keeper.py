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

from ablate.cluster import Attempt, Gang, LocalCluster
from ablate.errors import ClusterError
from ablate.keeper import Ended, Keeper, Rank, describe_code, import_ahead, wait_until_free

HERE = Path(__file__).parent


def rank_of(trial: Path) -> Rank:
    env = {"RANK": "0", "ABLATE_TRIAL": str(trial), "ABLATE_ATTEMPT": "1", "PYTHONPATH": str(HERE)}
    return Rank(0, env, str(trial / "attempts" / "1" / "log-0.txt"))


def test_ranks_end_with_their_lease(tmp_path: Path) -> None:
    """A rank lives while the lease is renewed; when nobody renews it the rank is killed."""

    async def live() -> tuple[float, Ended]:
        keeper = Keeper(address="127.0.0.1")
        await keeper.open()
        try:
            keeper.renew(60)
            await keeper.run("g", "cluster_entries:sleep", [rank_of(tmp_path)])
            while not (tmp_path / "attempts" / "1" / "up-0").exists():
                await asyncio.sleep(0.01)
            for _ in range(5):
                keeper.renew(0.5)
                await asyncio.sleep(0.2)
            last = time.monotonic()
            ended = await keeper.ended("g")
            return time.monotonic() - last, ended
        finally:
            await keeper.close()

    waited, ended = asyncio.run(live())
    assert ended.codes == {0: -signal.SIGKILL} and ended.failed == 0
    assert "could not hear the controller" in ended.reason
    assert waited >= 0.2


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
    """A seat is used again when no process is on its GPU; one that stays is named after a while."""
    tool = tmp_path / "nvidia-smi"
    users = tmp_path / "users"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {users}\n')
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    users.write_text("4242, 61012 MiB, GPU-1\n")
    with pytest.raises(ClusterError, match="4242, 61012 MiB"):
        asyncio.run(wait_until_free(["1", "3"], timeout_s=0.3))
    assert "--id=1,3 " in (tmp_path / "asked").read_text()

    async def leaves() -> None:
        waiting = asyncio.create_task(wait_until_free(["1"], timeout_s=60))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        users.write_text("")
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
        gang = Gang(workers, cpus_per_worker=0.1)
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
