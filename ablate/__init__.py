"""Distributed hyperparameter ablation studies for vision-language training.

``ablate.load(STUDY or RUN)``, ``ablate.analyze(RESULTS)`` and ``ablate.import_runs(SOURCE)`` are
the verbs for Python (:mod:`ablate.api`); they are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablate.api import Run, analyze, import_runs, load

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "analyze", "import_runs", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Run", "analyze", "import_runs", "load"):
        from ablate import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
