"""The markers, one a file. A new one: a dataclass in a file of its own here; it is found."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from ablate.markers.marker import Marker


def _found() -> tuple[type[Marker], ...]:
    """The markers of all files of this folder, by name."""
    files = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    kinds = [
        item
        for file in files
        for item in vars(file).values()
        if isinstance(item, type) and issubclass(item, Marker) and item.__module__ == file.__name__
    ]
    return tuple(sorted(kinds, key=lambda kind: kind.name))


RULES: tuple[type[Marker], ...] = _found()
