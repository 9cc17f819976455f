"""The keeper of this machine, from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import IO, Any

import psutil

from ablate.cluster.keeper.devices import wait_until_free
from ablate.cluster.keeper.wire import Ended, Estate, HostLost, Rank, describe_code
from ablate.errors import ClusterError
from ablate.trial.pulse import START_PATIENCE, START_PATIENCE_S


class Keeper:
    """The machine this runs on, as a host of ranks. All methods belong to one asyncio loop."""

    def __init__(
        self, *, address: str, name: str | None = None, preload: Sequence[str] = ()
    ) -> None:
        self.address = address
        self.name = name or socket.gethostname()
        self.preload = tuple(preload)
        self.lost: str | None = None
        self._used = False
        self._idle: dict[str, float] = {}
        """MiB in use on each accelerator when nobody uses it."""
        self._patience_s = float(os.environ.get(START_PATIENCE, START_PATIENCE_S))
        self._replies: dict[tuple[str, str], asyncio.Future[dict[str, Any]]] = {}
        self._pids: dict[str, dict[int, int]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Start the process. Returns before it has imported anything; orders wait for that."""
        ours, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()
        env = dict(os.environ)
        # The imports of this process, found by that one.
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        # Threads started by an import would not survive a fork; ranks set their own number.
        env.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "ablate.cluster.keeper",
                str(theirs.fileno()),
                json.dumps(self.preload),
            ],
            env=env,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            start_new_session=True,
        )
        theirs.close()
        ours.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 22)
        self._reading = asyncio.create_task(self._read(reader))

    async def reserve(self, gang: str) -> int:
        """A port on this host's address, bound and listening until the gang's rank 0 takes it."""
        return int((await self._ask("reserve", gang, address=self.address))["port"])

    async def run(
        self, gang: str, entry: str, ranks: Sequence[Rank], devices: Sequence[str] = ()
    ) -> dict[int, int]:
        """Fork ranks, once the accelerators given are seen to be free; pid by rank."""
        await wait_until_free(devices, self._idle)
        self._expect("ended", gang)
        forks = [{"rank": rank.rank, "env": dict(rank.env), "log": rank.log} for rank in ranks]
        reply = await self._ask("run", gang, entry=entry, address=self.address, ranks=forks)
        self._pids[gang] = {int(rank): pid for rank, pid in reply["pids"].items()}
        return self._pids[gang]

    async def ended(self, gang: str) -> Ended:
        """Wait until nothing of the gang is alive on this host."""
        reply = await self._expect("ended", gang)
        self._replies.pop(("ended", gang), None)
        self._pids.pop(gang, None)
        codes = {int(rank): code for rank, code in reply["codes"].items()}
        return Ended(codes, reply["failed"], reply["reason"], reply["stuck"])

    async def stop(self, gang: str, grace_s: float) -> None:
        """SIGTERM to the ranks now, SIGKILL to the whole tree after the grace (0: at once)."""
        if self.lost is None:
            self._send("stop", gang, grace_s=grace_s)

    async def fence(self) -> None:
        """Nothing to wait for: the kernel kills the ranks with their keeper."""

    def renew(self, lease_s: float, *, grace_s: float) -> None:
        """Let ranks live on for so long; then they have the grace for a checkpoint.

        Without a first call they live as long as the client.
        """
        if self.lost is None:
            self._send("renew", "", lease_s=lease_s, grace_s=grace_s)

    def inherit(self, estate: Estate) -> None:
        """Leave an estate to the keeper process."""
        self._send("inherit", "", **asdict(estate))

    async def close(self) -> None:
        """Kill everything and wait for the keeper's own end."""
        if self._writer is not None and self._reading is not None:
            self._writer.close()
            if not self._used:  # it may still be importing
                self._end_process()
            await self._reading

    def _end_process(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _ask(self, op: str, gang: str, **content: object) -> dict[str, Any]:
        if self.lost is not None:
            raise HostLost(self.lost)
        self._used = True
        reply = self._expect(op, gang)
        self._send(op, gang, **content)
        try:
            answer = await asyncio.wait_for(asyncio.shield(reply), self._patience_s)
        except TimeoutError:
            self._end_process()
            raise HostLost(
                f"{self.name}: the keeper of its ranks did not come to its orders within "
                f"{self._patience_s:.0f} s: its imports ({', '.join(self.preload)}) hang, as with "
                f"a file system that is away; {START_PATIENCE} sets the patience there"
            ) from None
        self._replies.pop((op, gang), None)
        if "error" in answer:
            self._replies.pop(("ended", gang), None)
            raise ClusterError(f"{self.name}: {answer['error']}")
        return answer

    def _send(self, op: str, gang: str, **content: object) -> None:
        assert self._writer is not None, "open() first"
        self._writer.write(json.dumps({"op": op, "gang": gang, **content}).encode() + b"\n")

    def _expect(self, op: str, gang: str) -> asyncio.Future[dict[str, Any]]:
        future = self._replies.get((op, gang))
        if future is None:
            future = self._replies[op, gang] = asyncio.get_running_loop().create_future()
            # A host that is lost fails every future; not each of them has a reader.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            if self.lost is not None:
                future.set_exception(HostLost(self.lost))
        return future

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hand replies to who waits for them; at the end of the stream, clear up."""
        assert self._process is not None and self._writer is not None and self._stderr is not None
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                message = json.loads(line)
                future = self._expect(message["op"], message["gang"])
                if not future.done():
                    future.set_result(message)
        code = await asyncio.to_thread(self._process.wait)
        kill_sessions(pid for pids in self._pids.values() for pid in pids.values())
        self.lost = self._epitaph(code)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(HostLost(self.lost))
        self._stderr.close()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    def _epitaph(self, code: int) -> str:
        assert self._stderr is not None
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        if code == 1 and said:
            return f"{self.name}: importing {', '.join(self.preload)} ahead failed:\n{said}"
        return (
            f"{self.name}: the keeper of its ranks ended with {describe_code(code)}. {said}".strip()
        )


def kill_sessions(leaders: Iterable[int]) -> None:
    """SIGKILL every process whose session one of these pids leads: the tree of a dead keeper."""
    sessions = set(leaders)
    if not sessions:
        return
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) in sessions:
                os.kill(pid, signal.SIGKILL)
