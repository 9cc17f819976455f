"""The keeper process: a loop in one thread, because PR_SET_PDEATHSIG is tied to the thread that
forks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

from ablate.cluster.keeper.devices import interface_of, variables_of
from ablate.cluster.keeper.pulse import Pulse
from ablate.cluster.keeper.rank import (
    be_rank,
    exit_code,
    host_environment,
    import_ahead,
    leave,
    open_log,
)
from ablate.cluster.keeper.share import Share, send
from ablate.trial.pulse import START_PATIENCE, START_PATIENCE_S

_TICK_S = 0.02
# How often the signs of life of running ranks are looked at.
_LOOK_S = 1.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class _Server:
    """Obeys one client, forks ranks for it, and outlives none of them."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.gangs: dict[str, Share] = {}
        self.stores: dict[str, socket.socket] = {}
        self.estate: dict[str, Any] | None = None
        self.lease: float | None = None  # monotonic time until which the controller is believed in
        self.lease_grace_s = 0.0
        self.looked = time.monotonic()
        self.wake, self.waker = socket.socketpair()
        self.selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Until the client goes away; then nothing is left."""
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
                # Nobody renewed it: soon the controller will start successors elsewhere.
                # Counted from the lease's end: a machine that was asleep meanwhile has no grace.
                grace_s = max(0.0, self.lease + self.lease_grace_s - time.monotonic())
                self.lease = None
                for gang in self.gangs.values():
                    gang.leave("its machine could not hear the controller", grace_s)
            self._look()
            for name in list(self.gangs):
                self._advance(name)

    def _patience(self) -> float | None:
        """Seconds until something is due: quick ticks only while a gang is ending."""
        deadlines = [due for gang in self.gangs.values() for due in gang.deadlines]
        if self.gangs and self.lease is not None:
            deadlines.append(self.lease)
        if not all(gang.ending for gang in self.gangs.values()):
            deadlines.append(self.looked + _LOOK_S)
        if not deadlines:
            return None
        return max(_TICK_S, min(deadlines) - time.monotonic())

    def _look(self) -> None:
        now = time.monotonic()
        if now - self.looked < _LOOK_S:
            return
        elapsed_s = min(now - self.looked, 2 * _LOOK_S)
        self.looked = now
        for gang in self.gangs.values():
            gang.look(elapsed_s)

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
                gang.note_end(pid, os.waitstatus_to_exitcode(status))

    def _advance(self, name: str) -> None:
        gang = self.gangs[name]
        others = {
            pid for other in self.gangs.values() if other is not gang for pid in other.pids.values()
        }
        if gang.advance(others):
            gang.close()
            del self.gangs[name]
            self._say("ended", name, **gang.ended())

    def _say(self, op: str, gang: str, **content: object) -> None:
        # A client that is gone shows as the end of its stream; the next select sees it.
        with contextlib.suppress(ConnectionError):
            self.client.sendall(json.dumps({"op": op, "gang": gang, **content}).encode() + b"\n")

    def _obey(self, order: dict[str, Any]) -> None:
        name = order["gang"]
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
            case "renew":
                self.lease = time.monotonic() + order["lease_s"]
                self.lease_grace_s = order["grace_s"]
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
        gang = Share()
        network = variables_of(interface_of(address))
        with contextlib.ExitStack() as opened:
            store = self.stores.pop(name, None)
            if store is not None:
                opened.enter_context(store)
            logs = []
            for rank in ranks:
                logs.append(open_log(Path(rank["log"])))
                opened.callback(os.close, logs[-1])
            self.gangs[name] = gang
            for rank, log in zip(ranks, logs, strict=True):
                env = {**network, **host_environment(), **rank["env"]}
                patience_s = float(env.get(START_PATIENCE, START_PATIENCE_S))
                pulse = gang.pulses[rank["rank"]] = Pulse(start_patience_s=patience_s)
                opened.callback(os.close, pulse.descriptor)
                env["ABLATE_PULSE_FD"] = str(pulse.descriptor)
                foreign = store
                if rank["rank"] == 0 and store is not None:
                    env["ABLATE_STORE_FD"] = str(store.fileno())
                    foreign = None
                try:
                    pid = self._fork(entry, env, log, foreign)
                except OSError:  # no process or memory left
                    gang.kill()
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
            code = be_rank(entry)
        except SystemExit as stop:
            code = exit_code(stop.code)
        except BaseException:
            traceback.print_exc()
        finally:
            leave(code)

    def _stop(self, name: str, grace_s: float) -> None:
        if store := self.stores.pop(name, None):
            store.close()
        if gang := self.gangs.get(name):
            gang.stop(grace_s)

    def _kill_everything(self) -> None:
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            self._reap()
            children = psutil.Process().children(recursive=True)
            if not children:
                break
            for child in children:
                send(child.pid, signal.SIGKILL)
            time.sleep(_TICK_S)
        if self.estate is not None and not _lives(*self.estate["owner"]):
            for pid, created in self.estate["processes"]:
                if _lives(pid, created):
                    send(pid, signal.SIGKILL)
            shutil.rmtree(self.estate["folder"], ignore_errors=True)


def _lives(pid: int, created: float) -> bool:
    """A process is there and is the one that was created then."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


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
    gc.disable()  # a fifth of the time of the imports
    try:
        import_ahead(json.loads(sys.argv[2]))
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise RuntimeError("a preloaded module opened the GPU; a forked rank could not use it")
        gc.collect()
        gc.freeze()  # what is shared stays shared: the collector writes to no inherited object
        gc.enable()
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    _Server(client).serve()
