"""What can be read from the features of labelled images, one kind a file. A new one: a class with
``kind``, ``MEASURES`` (KIND_top1) and ``top1`` in a file of its own here; every recipe that
evaluates features has it. Imports no torch.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from ablate.training.evaluations.fields import OnFeatures


def _found() -> tuple[type[OnFeatures], ...]:
    """The kinds of all files of this folder, by the names of the files."""
    files = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return tuple(
        item
        for file in files
        for item in vars(file).values()
        if isinstance(item, type) and item.__module__ == file.__name__
    )


ON_FEATURES = _found()
