"""What a node's own settings would do to a gang: shared memory, limits, network, clock."""

from __future__ import annotations

import math
import os
import resource
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablate.cluster.keeper.devices import INTERFACE_VARIABLES
from ablate.runner.doctor import Finding
from ablate.words import counted

_OPEN_FILES = 4096
"""Shards, loading processes and sockets of a worker stay below so many."""
_CLOCK_S = 2.0


def look() -> dict[str, Any]:
    """What this process was given, and what it was told of the network; for :func:`judge`."""
    shm = Path("/dev/shm")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "shm_gib": shutil.disk_usage(shm).free / 2**30 if shm.is_dir() else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": None if locked == resource.RLIM_INFINITY else locked,
        "infiniband": Path("/sys/class/infiniband").is_dir(),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "named_interfaces": {
            name: os.environ[name] for name in INTERFACE_VARIABLES if os.environ.get(name)
        },
        "time": time.time(),
    }


def judge(
    sights: Sequence[Mapping[str, Any]],
    *,
    between: tuple[float, float],
    shared_gib: float | None = None,
) -> list[Finding]:
    """Plain rules over what :func:`look` saw on each node (`node`), by each rank that it can hold.

    `between`: this machine's time of day before the first probe and after the last. `shared_gib`:
    what one rank's loading processes hold in /dev/shm, where that is known.
    """
    ranks = Counter(sight["node"] for sight in sights)
    # Every rank's word counts: two machines may have one name.
    in_order = sorted(sights, key=lambda sight: str(sight["node"]))
    rules: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "shared memory": lambda sight: _small_memory(sight, ranks[sight["node"]], shared_gib),
        "limits": _low_limits,
        "interfaces": _missing_interface,
        "clock": lambda sight: _wrong_clock(sight, between),
    }
    well = {
        "shared memory": "enough on every node",
        "limits": "open files and locked memory suffice on every node",
        "interfaces": "those that are named are there on every node",
        "clock": "no node's time of day is off",
    }
    findings = []
    for subject, rule in rules.items():
        said = {sight["node"]: why for sight in in_order if (why := rule(sight))}
        if said:
            why = "; ".join(f"{node}: {each}" for node, each in said.items())
            findings.append(Finding(subject, "warning", why))
        elif sights:
            findings.append(Finding(subject, "ok", well[subject]))
    return findings


def _small_memory(sight: Mapping[str, Any], ranks: int, shared_gib: float | None) -> str:
    free, need = sight["shm_gib"], 1.0 if shared_gib is None else shared_gib * ranks
    if free is None or free >= need:
        return ""
    takes = "" if shared_gib is None else f"; those of {counted(ranks, 'rank')} take {need:.1f} GiB"
    return (
        f"{free:.1f} GiB free in /dev/shm, where loading processes hand batches over{takes}: give "
        f"the container --shm-size={math.ceil(need) + 1}g, or set a smaller prefetch or fewer "
        "workers"
    )


def _low_limits(sight: Mapping[str, Any]) -> str:
    if sight["open_files"] < _OPEN_FILES:
        return (
            f"{sight['open_files']} open files a process; shards, loaders and sockets take more: "
            f"ulimit -n {_OPEN_FILES} where Ray is started"
        )
    if sight["infiniband"] and sight["locked_memory"] is not None:
        return "locked memory is limited, and InfiniBand needs it: ulimit -l unlimited"
    return ""


def _missing_interface(sight: Mapping[str, Any]) -> str:
    """NCCL's and gloo's way to name interfaces: prefixes, `=` before exact names, `^` before those
    that are not to be used."""
    for variable, value in sight["named_interfaces"].items():
        exact, names = value.startswith("="), value.removeprefix("=").split(",")
        there = [
            each
            for each in sight["interfaces"]
            if any(each == name or (not exact and each.startswith(name)) for name in names)
        ]
        if not value.startswith("^") and not there:
            have = ", ".join(sight["interfaces"])
            return f"{variable}={value} names no interface there ({have})"
    return ""


def _wrong_clock(sight: Mapping[str, Any], between: tuple[float, float]) -> str:
    began, over = between
    off_s = max(began - sight["time"], sight["time"] - over)
    if off_s < _CLOCK_S:
        return ""
    way = "behind" if sight["time"] < began else "ahead"
    return f"its time of day is at least {off_s:.0f} s {way} of this machine's: set it by NTP"
