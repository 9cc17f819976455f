"""Words that follow a number or a list, where people read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ablate.study import Study


def counted(number: int, noun: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def are(number: int) -> str:
    """The verb that follows so many."""
    return "is" if number == 1 else "are"


def name_seeds(seeds: Sequence[int]) -> str:
    """``seed 0``, ``seeds 0, 1``."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def file_of(study: Study) -> str:
    """The study file's name, for commands to type."""
    return study.path.replace("\\", "/").rsplit("/", 1)[-1]
