"""Becoming a rank: what a fork of the keeper does before and after the entry of a trial."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import os
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn


def host_environment() -> dict[str, str]:
    """The keeper's environment without what is for Ray's own processes, its token above all."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name != "CUDA_VISIBLE_DEVICES"
    }


def open_log(path: Path) -> int:
    trial = path.parents[2]  # TRIAL/attempts/<k>/log-<rank>.txt
    if not trial.is_dir():
        raise FileNotFoundError(
            f"the trial folder {trial} does not exist on {socket.gethostname()}: the study folder "
            "must lie on storage that every node mounts at the same path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def be_rank(entry: str) -> int:
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
    return exit_code(find(entry)())


def find(entry: str) -> Any:
    """What ``module:function`` names."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def exit_code(result: object) -> int:
    if result is None:
        return 0
    if isinstance(result, int):
        return result & 0xFF
    print(result, file=sys.stderr)
    return 1


def leave(code: int) -> NoReturn:
    """End like a multiprocessing child: exit functions, flushed streams, no teardown."""
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def import_ahead(names: Iterable[str]) -> None:
    """Import modules. ``module:NAME`` imports the module and then every module listed in NAME."""
    for name in names:
        module, _, attribute = name.partition(":")
        imported = importlib.import_module(module)
        if attribute:
            import_ahead(getattr(imported, attribute))
