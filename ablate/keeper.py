"""The keeper: one process per machine that forks the ranks of gangs and leaves nothing behind.

``python -m ablate.keeper FD MODULES`` imports once what training needs (no accelerator context),
then forks every rank from itself: a fresh process per attempt that is training after milliseconds.
It is the subreaper of all that descends from its ranks, so a data loader or a daemon that outlives
its rank comes back to it and is killed. When its client goes away the socket ends, and it kills
everything and exits; when it is killed itself, the kernel kills its ranks (PR_SET_PDEATHSIG).

The client half is the class :class:`Keeper` (asyncio). Both halves speak one JSON object per line
over a socket pair. Only the standard library and psutil are imported here.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import mmap
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

from ablate.errors import ClusterError
from ablate.trial import ORDERLY

# An orderly end leaves this long to what the rank started (multiprocessing's resource tracker
# unlinks its semaphores when its pipe closes); after that, and after any other end, SIGKILL.
_AFTERLIFE_S = 1.0
# Between asking a rank that ignored SIGTERM, or hangs, for its stacks and killing it.
_DUMP_S = 0.3
_TICK_S = 0.02
# How often the signs of life of running ranks are looked at, and how long a rank may stay stopped.
_LOOK_S = 1.0
_STOPPED_S = 10.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Rank:
    """One process to fork: number in the gang, environment on top of the host's, log file."""

    rank: int
    env: Mapping[str, str]
    log: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How the ranks of one gang on one host ended: exit code by rank (negative: signal).

    ``failed`` is the first rank that ended out of order, None when none did or they were stopped;
    ``reason`` is why, where the exit code does not say it.
    """

    codes: Mapping[int, int]
    failed: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Estate:
    """What a keeper clears up when it ends and finds the owner dead: processes, and a folder.

    Processes are named by pid and creation time, because pids are used again.
    """

    owner: tuple[int, float]
    processes: tuple[tuple[int, float], ...]
    folder: str


class HostLost(Exception):
    """The keeper, or the machine it runs on, is gone."""


# ---------------------------------------------------------------------------------------------
# The keeper process


class _Pulse:
    """What a rank last said of itself (:mod:`ablate.training.pulse`), and for how long since.

    Time counts only while the keeper runs: when a batch system suspends the whole job, nobody is
    late.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("pulse")
        os.ftruncate(self.descriptor, 16)
        self.cell = mmap.mmap(self.descriptor, 16)
        self.mark = 0.0
        self.silent_s = 0.0
        self.stopped_s = 0.0

    def look(self, pid: int, elapsed_s: float) -> str:
        """What is wrong with the rank; empty when nothing is."""
        mark, patience_s = struct.unpack("=dd", self.cell)
        self.silent_s = self.silent_s + elapsed_s if mark == self.mark else 0.0
        self.mark = mark
        try:
            stopped = psutil.Process(pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return ""
        self.stopped_s = self.stopped_s + elapsed_s if stopped else 0.0
        if self.stopped_s >= _STOPPED_S:
            return f"it was stopped by a signal (SIGSTOP) for {self.stopped_s:.0f} s"
        if mark and self.silent_s > patience_s:
            return (
                f"no step or evaluation ended for {self.silent_s:.0f} s, the stacks of all threads "
                "are in the logs; ABLATE_PATIENCE_S and ABLATE_EVALUATION_PATIENCE_S set the least "
                "patience"
            )
        return ""

    def close(self) -> None:
        self.cell.close()


@dataclass(slots=True)
class _Gang:
    pids: dict[int, int]  # rank -> pid, while it lives
    pulses: dict[int, _Pulse] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    failed: int | None = None
    reason: str = ""
    stopped: bool = False
    dump_at: float | None = None
    kill_at: float | None = None


class _Server:
    """The keeper's loop. One thread: PR_SET_PDEATHSIG is tied to the thread that forks."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.gangs: dict[str, _Gang] = {}
        self.stores: dict[str, socket.socket] = {}
        self.estate: dict[str, Any] | None = None
        self.lease_s: float | None = None
        self.lease: float | None = None  # monotonic time until which the controller is believed in
        self.looked = time.monotonic()
        self.wake, self.waker = socket.socketpair()
        self.selector = selectors.DefaultSelector()

    def serve(self) -> None:
        for end in (self.wake, self.waker):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        self.selector.register(self.client, selectors.EVENT_READ)
        self.selector.register(self.wake, selectors.EVENT_READ)
        pending = b""
        while True:
            for key, _ in self.selector.select(self._patience()):
                if key.fileobj is self.wake:
                    with contextlib.suppress(BlockingIOError):
                        self.wake.recv(4096)
                    continue
                try:
                    chunk = self.client.recv(1 << 16)
                except ConnectionError:
                    chunk = b""
                if not chunk:
                    return self._kill_everything()
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))
            self._reap()
            if self.lease is not None and time.monotonic() > self.lease:
                self._give_up()
            self._look()
            for name in list(self.gangs):
                self._advance(name)

    def _patience(self) -> float | None:
        """Seconds until something is due: quick ticks only while a gang is ending."""
        deadlines = [
            deadline
            for gang in self.gangs.values()
            for deadline in (gang.dump_at, gang.kill_at, self.lease)
            if deadline is not None
        ]
        if any(gang.kill_at is None for gang in self.gangs.values()):
            deadlines.append(self.looked + _LOOK_S)
        if not deadlines:
            return None
        return max(_TICK_S, min(deadlines) - time.monotonic())

    def _say(self, op: str, gang: str, **content: object) -> None:
        # A client that is gone shows as the end of its stream; the next select sees it.
        with contextlib.suppress(ConnectionError):
            self.client.sendall(json.dumps({"op": op, "gang": gang, **content}).encode() + b"\n")

    def _obey(self, order: dict[str, Any]) -> None:
        name = order["gang"]
        self.lease_s = order.get("lease_s", self.lease_s)
        if self.lease_s is not None:  # every order is a sign of life
            self.lease = time.monotonic() + self.lease_s
        match order["op"]:
            case "reserve":
                try:
                    port = self._reserve(name, order["address"])
                except OSError as error:
                    return self._say(
                        "reserve", name, error=f"no port on {order['address']}: {error}"
                    )
                self._say("reserve", name, port=port)
            case "run":
                try:
                    pids = self._run(name, order["entry"], order["address"], order["ranks"])
                except OSError as error:
                    return self._say("run", name, error=str(error))
                self._say("run", name, pids=pids)
            case "stop":
                self._stop(name, order["grace_s"])
            case "inherit":
                self.estate = order

    def _reserve(self, name: str, address: str) -> int:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        store = socket.socket(family, socket.SOCK_STREAM)
        try:
            store.bind((address, 0))
            store.listen(2048)
        except OSError:
            store.close()
            raise
        self.stores[name] = store
        return int(store.getsockname()[1])

    def _run(
        self, name: str, entry: str, address: str, ranks: list[dict[str, Any]]
    ) -> dict[int, int]:
        gang = _Gang(pids={})
        interface = interface_of(address)
        network = {} if interface is None else dict.fromkeys(_INTERFACE_VARIABLES, interface)
        with contextlib.ExitStack() as opened:
            store = self.stores.pop(name, None)
            if store is not None:
                opened.enter_context(store)
            logs = []
            for rank in ranks:
                logs.append(_open_log(Path(rank["log"])))
                opened.callback(os.close, logs[-1])
            self.gangs[name] = gang
            for rank, log in zip(ranks, logs, strict=True):
                env = {**network, **_host_environment(), **rank["env"]}
                pulse = gang.pulses[rank["rank"]] = _Pulse()
                opened.callback(os.close, pulse.descriptor)
                env["ABLATE_PULSE_FD"] = str(pulse.descriptor)
                foreign = store
                if rank["rank"] == 0 and store is not None:
                    env["ABLATE_STORE_FD"] = str(store.fileno())
                    foreign = None
                try:
                    pid = self._fork(entry, env, log, foreign)
                except OSError:  # no process or memory left
                    gang.kill_at = 0.0
                    raise
                gang.pids[rank["rank"]] = pid
        return dict(gang.pids)

    def _fork(
        self, entry: str, env: dict[str, str], log: int, foreign: socket.socket | None
    ) -> int:
        """Fork one rank; ``foreign`` is the store of the gang's rank 0, which others let go of."""
        keeper = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:  # died before the line above
                os._exit(1)
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray blocks SIGINT in its processes
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Fork-only descendants must not hold the keeper's ends open.
            self.selector.close()
            for end in (self.client, self.wake, self.waker, *self.stores.values()):
                end.close()
            if foreign is not None:
                foreign.close()
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.clear()
            os.environ.update(env)
            code = _be_rank(entry)
        except SystemExit as stop:
            code = _exit_code(stop.code)
        except BaseException:
            traceback.print_exc()
        finally:
            _leave(code)

    def _stop(self, name: str, grace_s: float) -> None:
        if store := self.stores.pop(name, None):
            store.close()
        gang = self.gangs.get(name)
        if gang is None or gang.kill_at == 0.0:
            return
        kill_at = time.monotonic() + grace_s
        if not gang.stopped and gang.pids and grace_s > 0:
            for pid in gang.pids.values():
                _signal(pid, signal.SIGTERM)
        gang.stopped = True
        if gang.kill_at is None or kill_at < gang.kill_at:
            gang.kill_at = kill_at if grace_s > 0 else 0.0
            gang.dump_at = kill_at - _DUMP_S if grace_s > 2 * _DUMP_S else None

    def _give_up(self) -> None:
        """Nobody renewed the lease: the controller may long have started successors elsewhere."""
        self.lease = None
        for gang in self.gangs.values():
            if gang.kill_at != 0.0:
                gang.kill_at = 0.0
                gang.failed = min(gang.pids, default=None)
                gang.reason = "its machine could not hear the controller"

    def _look(self) -> None:
        """End gangs with a rank that makes no progress: the others wait for it in a collective."""
        now = time.monotonic()
        if now - self.looked < _LOOK_S:
            return
        elapsed_s = min(now - self.looked, 2 * _LOOK_S)
        self.looked = now
        for gang in self.gangs.values():
            if gang.kill_at is not None:
                continue
            found = {r: gang.pulses[r].look(pid, elapsed_s) for r, pid in gang.pids.items()}
            late = {rank: reason for rank, reason in found.items() if reason}
            if late:
                gang.failed, gang.reason = next(iter(late.items()))
                gang.dump_at, gang.kill_at = now, now + _DUMP_S

    def _reap(self) -> None:
        """Collect every child that ended: ranks, and orphans that were adopted."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for gang in self.gangs.values():
                for rank in [r for r, p in gang.pids.items() if p == pid]:
                    self._note_end(gang, rank, os.waitstatus_to_exitcode(status))

    def _note_end(self, gang: _Gang, rank: int, code: int) -> None:
        gang.codes[rank] = code
        del gang.pids[rank]
        if code not in ORDERLY and gang.kill_at != 0.0:
            # The others would wait in a collective for a rank that never comes.
            if gang.failed is None and not (gang.stopped and code == -signal.SIGTERM):
                gang.failed = rank
            gang.kill_at = 0.0
        elif not gang.pids and gang.kill_at != 0.0:
            gang.kill_at = time.monotonic() + _AFTERLIFE_S
            gang.dump_at = None

    def _advance(self, name: str) -> None:
        gang = self.gangs[name]
        now = time.monotonic()
        if gang.dump_at is not None and now >= gang.dump_at:
            gang.dump_at = None
            for pid in gang.pids.values():
                _signal(pid, signal.SIGUSR1)
        if gang.kill_at is None:
            return
        remains = self._remains(gang)
        if remains and now >= gang.kill_at:
            gang.kill_at = 0.0
            for process in remains:
                _signal(process.pid, signal.SIGKILL)
        if remains or gang.pids:
            return
        for pulse in gang.pulses.values():
            pulse.close()
        del self.gangs[name]
        self._say("ended", name, codes=gang.codes, failed=gang.failed, reason=gang.reason)

    def _remains(self, gang: _Gang) -> list[psutil.Process]:
        """What is left of a gang: its ranks, what descends from them, adopted orphans; zombies too.

        An orphan that left its rank's session belongs to nobody; it ends with the next gang that
        does. Only sessions of other living ranks are spared.
        """
        others = {
            pid for other in self.gangs.values() if other is not gang for pid in other.pids.values()
        }
        remains: list[psutil.Process] = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if child.pid in others or os.getsid(child.pid) in others:
                    continue
                remains += [child, *child.children(recursive=True)]
        return remains

    def _kill_everything(self) -> None:
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            self._reap()
            children = psutil.Process().children(recursive=True)
            if not children:
                break
            for child in children:
                _signal(child.pid, signal.SIGKILL)
            time.sleep(_TICK_S)
        if self.estate is not None and not _lives(*self.estate["owner"]):
            for pid, created in self.estate["processes"]:
                if _lives(pid, created):
                    _signal(pid, signal.SIGKILL)
            shutil.rmtree(self.estate["folder"], ignore_errors=True)


def _lives(pid: int, created: float) -> bool:
    """A process is there and is the one that was created then."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_of(address: str) -> str | None:
    """The network interface that holds an address, None when no interface does.

    Gloo and NCCL otherwise listen on the interface that the host's name happens to resolve to.
    """
    # The whole of 127.0.0.0/8 is loopback, but the interface lists 127.0.0.1 alone.
    wanted = {address, "127.0.0.1"} if address.startswith("127.") else {address}
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address in wanted for entry in addresses):
            return name
    return None


def _host_environment() -> dict[str, str]:
    """The keeper's environment without what is for Ray's own processes, its token above all."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name != "CUDA_VISIBLE_DEVICES"
    }


def _open_log(path: Path) -> int:
    trial = path.parents[2]  # TRIAL/attempts/<k>/log-<rank>.txt
    if not trial.is_dir():
        raise FileNotFoundError(
            f"the trial folder {trial} does not exist on {socket.gethostname()}: the study folder "
            "must lie on storage that every node mounts at the same path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _be_rank(entry: str) -> int:
    """Run ``module:function`` as a fresh interpreter with this environment would."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    known = set(sys.path)
    sys.path[:0] = [
        p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in known
    ]
    # OpenMP read OMP_NUM_THREADS when torch was imported in the keeper.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.argv = [entry]  # the entry reads the environment; these arguments were the keeper's own
    return _exit_code(_find(entry)())


def _find(entry: str) -> Any:
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def _exit_code(result: object) -> int:
    if result is None:
        return 0
    if isinstance(result, int):
        return result & 0xFF
    print(result, file=sys.stderr)
    return 1


def _leave(code: int) -> NoReturn:
    """End like a multiprocessing child: exit functions, flushed streams, no teardown."""
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def import_ahead(names: Iterable[str]) -> None:
    """Import modules. ``module:NAME`` imports the module and then every module listed in NAME."""
    for name in names:
        module, _, attribute = name.partition(":")
        imported = importlib.import_module(module)
        if attribute:
            import_ahead(getattr(imported, attribute))


def main() -> None:
    """Fork once, so that no job runner that kills its children's processes finds the keeper.

    Ray kills the direct children of an actor's process with SIGKILL when the actor ends, which
    would leave the ranks' own children behind. The parent only waits, and reaps.
    """
    keeper = os.fork()
    client = socket.socket(fileno=int(sys.argv[1]))
    if keeper:
        client.close()
        _, status = os.waitpid(keeper, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            os.kill(os.getpid(), -code)  # the same end, for the one who waits for us
        sys.exit(code)
    client.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        import_ahead(json.loads(sys.argv[2]))
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise RuntimeError("a preloaded module opened the GPU; a forked rank could not use it")
        gc.collect()
        gc.freeze()  # what is shared stays shared: the collector writes to no inherited object
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    _Server(client).serve()


# ---------------------------------------------------------------------------------------------
# The client


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
                "ablate.keeper",
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
        await wait_until_free(devices)
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
        return Ended(codes, reply["failed"], reply["reason"])

    async def stop(self, gang: str, grace_s: float) -> None:
        """SIGTERM to the ranks now, SIGKILL to the whole tree after the grace (0: at once)."""
        if self.lost is None:
            self._send("stop", gang, grace_s=grace_s)

    def renew(self, lease_s: float) -> None:
        """Let ranks live on for so long; without a first call they live as long as the client."""
        if self.lost is None:
            self._send("renew", "", lease_s=lease_s)

    def inherit(self, estate: Estate) -> None:
        """Leave an estate to the keeper process."""
        self._send("inherit", "", **asdict(estate))

    async def close(self) -> None:
        """Kill everything and wait for the keeper's own end."""
        if self._writer is not None and self._reading is not None:
            self._writer.close()
            if not self._used and self._process is not None:  # it may still be importing
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            await self._reading

    async def _ask(self, op: str, gang: str, **content: object) -> dict[str, Any]:
        if self.lost is not None:
            raise HostLost(self.lost)
        self._used = True
        reply = self._expect(op, gang)
        self._send(op, gang, **content)
        answer = await reply
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


def describe_code(code: int | None) -> str:
    """An exit code in words: ``exit code 3``, ``SIGKILL``."""
    if code is None:
        return "an unknown exit code"
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


async def wait_until_free(devices: Sequence[str], *, timeout_s: float = 30.0) -> None:
    """Wait until no process holds memory on the accelerators; nothing to ask without nvidia-smi.

    A killed process's GPU memory is returned by the driver some time after the process is gone.

    Raises:
        ClusterError: a device is still in use after the timeout; says by which processes.
    """
    if not devices or shutil.which("nvidia-smi") is None:
        return
    deadline = time.monotonic() + timeout_s
    while users := await _device_users(devices):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{socket.gethostname()}: accelerator still in use after {timeout_s:.0f} s by "
                + "; ".join(users)
            )
        await asyncio.sleep(0.2)


async def _device_users(devices: Sequence[str]) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        "nvidia-smi",
        f"--id={','.join(devices)}",
        "--query-compute-apps=pid,used_memory,gpu_uuid",
        "--format=csv,noheader",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    output, _ = await process.communicate()
    if process.returncode:  # cannot be asked, e.g. MIG slices
        return []
    return [line.strip() for line in output.decode().splitlines() if line.strip()]


if __name__ == "__main__":
    main()
