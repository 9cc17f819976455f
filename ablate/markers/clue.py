"""What may be asked of a run to tell what went wrong in it: facts, clues, causes, suspects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ablate.markers.event import Event, number

LEARNT = 0.3
"""Nat below chance from which on a model has learnt something."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What clues may ask about a run: its events and its resolved configuration."""

    events: Sequence[Event]
    config: Mapping[str, Any] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    """Markers that had no input."""

    def find(self, marker: str, kind: str = "") -> Event | None:
        """The first event of a marker."""
        for item in self.events:
            if item.marker == marker and kind in ("", item.evidence["kind"]):
                return item
        return None

    def says(self, marker: str, kind: str = "") -> str:
        """Its message, or nothing."""
        found = self.find(marker, kind)
        return found.message if found else ""

    def value(self, name: str) -> float:
        """A number of the configuration; NaN compares false with everything."""
        found = number(self.config.get(name))
        return math.nan if found is None else found

    def first_step(self, *markers: str) -> float:
        """Where the first event of any of these markers begins; infinity without one."""
        return min(
            (item.first_step for item in self.events if item.marker in markers), default=math.inf
        )

    @property
    def learnt(self) -> float:
        """Nat by which the loss had fallen below chance before it came back to it."""
        found = self.find("divergence", "chance")
        if found is None or not isinstance(lowest := found.evidence.get("lowest"), float):
            return math.nan
        return float(found.evidence["chance"]) - lowest


Ask = Callable[[Facts], str]
"""Answers with a sentence of evidence, or with nothing."""


@dataclass(frozen=True, slots=True)
class Clue:
    """Something that speaks for a cause when ``ask`` answers."""

    weight: float
    ask: Ask


@dataclass(frozen=True, slots=True)
class Cause:
    """A suspect."""

    name: str
    factors: Mapping[str, str]
    """Field of the recipe -> what to try."""
    source: str
    clues: tuple[Clue, ...]
    against: tuple[Clue, ...] = ()


@dataclass(frozen=True, slots=True)
class Suspect:
    """A cause with what speaks for it in one run."""

    cause: str
    score: float
    evidence: tuple[str, ...]
    factors: Mapping[str, str]
    source: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)
