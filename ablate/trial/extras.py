"""Libraries that only some recipes need, asked for before anything starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def refuse_without(libraries: Sequence[str], *, recipe: str, extra: str) -> None:
    """Raise ValueError, with the line that installs them, unless all of these can be imported."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"recipe {recipe} needs {' and '.join(missing)}, which this Python does not have. "
            f"Install: pip install 'ablate-runner[{extra}]'"
        )
