"""A run that was made elsewhere, in our rows, and the error of a file that holds none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablate.errors import AblateError
from ablate.markers.event import Context


class ForeignError(AblateError, ValueError):
    """A file that holds no run that could be read; says what would be."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A run made elsewhere, in our rows."""

    rows: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    context: Context
    """What the source says about the run itself; None where it does not."""
    notes: Sequence[str]
    """What was assumed, converted, ignored or missing, one sentence each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A trainer whose runs are known: what only its files have."""

    kind: str
    """What it leaves, for the list of what is read."""
    logs: tuple[str, ...]
    """Names of its log in the folder of a run, as glob patterns."""
    fractions: Mapping[str, str]
    """What its evaluations measure, by its own names in lower case -> ours; the first is the
    accuracy that is judged."""
    context: Context
    """What holds of every run of it."""
    read: Callable[[Path, str], Foreign | None]
    """The run of a log, or None where it is another's."""
    wrote: Callable[[Sequence[Path]], bool]
    """Whether these event files are its own."""
    recording: frozenset[str] = frozenset()
    """Names in its params.txt that say where a run went and how it was recorded, and nothing of
    what was trained."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What evaluations measure, as far as it is known from the trainers."""

    trainers: Sequence[Trainer] = ()

    @property
    def accuracies(self) -> tuple[str, ...]:
        """Those that are judged."""
        firsts = (next(iter(each.fractions.values()), None) for each in self.trainers)
        return tuple(dict.fromkeys(name for name in firsts if name))

    @property
    def fractions(self) -> tuple[str, ...]:
        """Those that may be given in per cent."""
        return tuple(dict.fromkeys(n for each in self.trainers for n in each.fractions.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.fractions, "eval_images")

    def find(self, name: str) -> str | None:
        """Our name of a column in lower case; None where it belongs to no evaluation."""
        if name in self.names:
            return name
        return next((t.fractions[name] for t in self.trainers if name in t.fractions), None)


NONE_KNOWN = Evaluated()


@dataclass(frozen=True, slots=True)
class Record:
    """What one line, row or event of a source holds, under the source's own names."""

    at: str
    """Where it stands, for errors: ``run.csv:3``."""
    values: Mapping[str, Any]


@dataclass(slots=True)
class Source:
    """The records of a source in its own order, and what it says of the run."""

    place: str
    records: list[Record]
    context: Context = field(default_factory=Context)
    notes: list[str] = field(default_factory=list)
    evaluated: Evaluated = NONE_KNOWN
