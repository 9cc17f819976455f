"""Sessions of one rank without a trial's process: what the loop is given in tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ablate.trial.session import RecordingSession


def alone(
    folder: Path,
    *,
    trial: str = "t",
    attempt: int = 1,
    metric: str = "imagenet_top1",
    stop_asked: Callable[[], bool] = lambda: False,
    about: Mapping[str, Any] | None = None,
) -> RecordingSession:
    """A session of rank 0 of one, for a trial judged by `metric`."""
    content = {
        "id": trial,
        "seed": 0,
        "gang": {"workers": 1},
        "objective": {"metric": metric, "direction": "maximize"},
    }
    session = RecordingSession(
        content, folder, attempt=attempt, config=None, recorded={}, stop_asked=stop_asked
    )
    session.about(**(about or {}))
    return session
