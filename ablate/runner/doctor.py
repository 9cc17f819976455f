"""Is this machine ready? Versions against known advisories, memory, disk, accelerators."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.version import Version

from ablate.records.files import free_gib
from ablate.records.provenance import installed

Level = Literal["ok", "warning", "error"]

_FLOORS = {
    "torch": ("2.10", "loading a checkpoint can run code (CVE-2026-24747)"),
    "ray": ("2.52", "the job port has no token authentication (CVE-2023-48022, CVE-2025-62593)"),
    "mlflow": ("3.8", "artifact names can leave their folder (CVE-2026-2033)"),
    "optuna": ("5.0", "the samplers behave differently"),
    "open_clip_torch": ("3.3", "flags and defaults differ"),
}
"""Package -> (lowest version that is safe here, what is wrong below it)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    level: Level
    message: str


def examine(folder: Path) -> list[Finding]:
    """Findings on this machine for studies under `folder`."""
    return [
        _python(),
        *examine_versions(),
        _memory(),
        _shared_memory(),
        examine_disk(folder),
        _compiler(),
        _accelerators(),
    ]


def examine_versions(find: Callable[[str], str | None] = installed) -> list[Finding]:
    """Versions of the engines, as `find` knows them, against those with known flaws."""
    return [_package(name, find(name)) for name in _FLOORS]


def _python() -> Finding:
    found = platform.python_version()
    return Finding("python", "ok", f"{found} on {platform.machine()}, {os.cpu_count()} cores")


def _package(name: str, found: str | None) -> Finding:
    floor, reason = _FLOORS[name]
    if found is None:
        return Finding(name, "error", "is not installed; install ablate-runner again")
    if Version(found) < Version(floor):
        return Finding(name, "error", f"{found} is below {floor}: {reason}; upgrade it")
    return Finding(name, "ok", found)


def _memory() -> Finding:
    free_gib = psutil.virtual_memory().available / 2**30
    message = f"{free_gib:.1f} GiB free"
    if free_gib < 4:
        return Finding("memory", "warning", f"{message}; a worker on CPU takes 1 to 2 GiB")
    return Finding("memory", "ok", message)


def examine_disk(folder: Path) -> Finding:
    """Whether there is space for checkpoints where `folder` is, or will be."""
    free = free_gib(folder)
    message = f"{free:.0f} GiB free for {folder}"
    if free < 5:
        return Finding("disk", "warning", f"{message}; checkpoints of RN50 take 1.2 GiB each")
    return Finding("disk", "ok", message)


def _shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "ok", "no /dev/shm; loading processes use files")
    free = shutil.disk_usage(place).free / 2**30
    message = f"{free:.1f} GiB free in {place}"
    if free < 1:
        return Finding(
            "shared memory",
            "warning",
            f"{message}; loading processes hand batches over there, and die of a bus error when "
            "it is full: start the container with --shm-size=8g, or set workers: 0",
        )
    return Finding("shared memory", "ok", message)


def _compiler() -> Finding:
    missing = [name for name in ("cc", "c++") if shutil.which(name) is None]
    if missing:
        return Finding(
            "compiler",
            "warning",
            f"no {' and no '.join(missing)}: torchcompile and cuda_graphs need both; install gcc "
            "and g++ to use them",
        )
    return Finding("compiler", "ok", "cc and c++, for torchcompile")


def _accelerators() -> Finding:
    import torch

    from ablate.training.arithmetic import why_no_gpu

    why = why_no_gpu()
    driver = _driver()
    if why is None:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("accelerators", "ok", ", ".join(names))
    if driver is None:
        return Finding("accelerators", "ok", "none; trials train on the CPU")
    return Finding(
        "accelerators",
        "error",
        f"nvidia-smi tells of {driver}, and torch {torch.__version__} can use none: {why}. A "
        "driver must be as new as torch's CUDA; in a container, it must be given the GPUs",
    )


def _driver() -> str | None:
    """GPUs and driver as nvidia-smi tells; None where it is not there or tells of none."""
    asked = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=_SMI_S, check=True)
    except subprocess.TimeoutExpired:
        return f"nothing within {_SMI_S:.0f} s, as with a GPU that hangs"
    except (OSError, subprocess.CalledProcessError):
        return None
    rows = [line.rpartition(", ") for line in said.stdout.splitlines() if line.strip()]
    if not rows:
        return None
    return f"{len(rows)} x {rows[0][0]} with driver {rows[0][2]}"


_SMI_S = 10.0
"""How long nvidia-smi may take to answer; a sick GPU can keep it for ever."""
