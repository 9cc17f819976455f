"""Versions of what a trial's numbers can depend on."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "ablate-runner",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "pillow",
    "numpy",
    "ray",
    "optuna",
    "mlflow",
)


def installed(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def code_of_here() -> dict[str, str]:
    """What this process would train with: :func:`fingerprint`, and a digest of ablate's own files,
    which may have been edited, or built again under the same version."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return {**fingerprint(), "ablate's files": digest.hexdigest()[:12]}


def fingerprint() -> dict[str, str]:
    """Package -> version, with Python and the processor's kind; for the record of a trial."""
    found = {name: installed(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: value for name, value in found.items() if value is not None},
    }
