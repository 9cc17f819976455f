"""Is this machine ready? Versions against known advisories, memory, disk, accelerators."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.version import Version

from ablate.records import free_gib
from ablate.versions import installed

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
    return [_python(), *examine_versions(), _memory(), examine_disk(folder), _accelerators()]


def examine_versions() -> list[Finding]:
    """Installed versions of the engines against those with known flaws."""
    return [_package(name) for name in _FLOORS]


def _python() -> Finding:
    found = platform.python_version()
    return Finding("python", "ok", f"{found} on {platform.machine()}, {os.cpu_count()} cores")


def _package(name: str) -> Finding:
    floor, reason = _FLOORS[name]
    found = installed(name)
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


def _accelerators() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("accelerators", "ok", "none; trials train on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("accelerators", "ok", ", ".join(names))
