"""Versions of what a trial's numbers can depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

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


def fingerprint() -> dict[str, str]:
    """Package -> version, with Python and the processor's kind; for the record of a trial."""
    found = {name: installed(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: value for name, value in found.items() if value is not None},
    }
