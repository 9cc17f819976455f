"""Cells, trials, their identity, the outcomes a trial can have, and the words of its processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ablate.records.files import FORMAT
from ablate.words import name_levels

Levels = tuple[tuple[str, str], ...]
"""(factor, level name) pairs, in the order of the study's factors."""

EXIT_STOPPED = 75
"""Exit status of a rank that was stopped after a checkpoint; as sysexits.h's EX_TEMPFAIL."""
EXIT_NO_SPACE = 74
"""Exit status of a rank whose disk is full, which says nothing about the trial; as EX_IOERR."""
EXIT_ALONE = 73
"""Exit status of a rank of a gang that wrote the trial's result while the others, who wait for it
in a collective, cannot know: they are to be ended. As EX_CANTCREAT, which nothing else here has."""
ORDERLY = frozenset({0, EXIT_STOPPED})
"""Exit statuses of a rank that ended in order: result written, or stopped after a checkpoint."""

SHARE = "ABLATE_SHARE"
"""Environment variable of a worker: how many of the trial's workers each rank stands for."""


class Outcome(StrEnum):
    """What came of one trial. A verdict (``markers``) is about its course, not its end."""

    COMPLETED = "completed"
    DIVERGED = "diverged"
    """A result: scored at chance level, kept in every table, never retried."""
    PRUNED = "pruned"
    """Ended early by a search's rule; never part of a confirmatory interval."""
    FAILED = "failed"
    """Crashed at every attempt it was allowed; says nothing about its setting."""
    INFEASIBLE = "infeasible"
    """The configuration does not fit the machine (out of memory); retrying cannot help."""
    LOST = "lost"
    """Its attempts kept disappearing with their machines; says nothing about its setting."""

    @property
    def scored(self) -> bool:
        """Whether the trial answers its question; others only say that it could not be asked."""
        return self in (Outcome.COMPLETED, Outcome.DIVERGED)

    @property
    def answered(self) -> bool:
        """Whether the trial tells something about its setting; a pruned one was behind others."""
        return self.scored or self is Outcome.PRUNED


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of levels: what is varied, without the seed."""

    levels: Levels
    """(factor, level name) for every factor of the study, in the study's order."""
    fields: tuple[tuple[str, Any], ...]
    """Configuration fields that these levels set on top of the baseline."""

    @property
    def name(self) -> str:
        """For people: the levels as ``factor=level``, comma-separated."""
        return name_levels(dict(self.levels)) or "baseline"


@dataclass(frozen=True, slots=True)
class Trial:
    """A cell with one seed, fully resolved: everything a worker needs, and nothing else."""

    id: str
    """12 hexadecimal digits of the configuration's hash; see :func:`identify`."""
    study: str
    cell: Cell
    seed: int
    recipe: str
    config: Mapping[str, Any]
    """Every field of the recipe's Config, resolved."""
    gang: Mapping[str, Any]
    """workers, cpus_per_worker, gpus_per_worker, strategy."""
    objective: Mapping[str, Any]
    markers: Mapping[str, Any]
    root: str
    """Folder that relative data paths are relative to."""

    def to_json(self) -> dict[str, Any]:
        """The content of trial.json."""
        return {
            "format": FORMAT,
            "id": self.id,
            "study": self.study,
            "levels": dict(self.cell.levels),
            "seed": self.seed,
            "recipe": self.recipe,
            "config": dict(self.config),
            "gang": dict(self.gang),
            "objective": dict(self.objective),
            "markers": dict(self.markers),
            "root": self.root,
        }


def identify(
    recipe: str, config: Mapping[str, Any], *, workers: int, not_identity: Iterable[str] = ()
) -> str:
    """The id of an experiment: 12 hexadecimal digits of a SHA-256.

    Hashed are the recipe, the number of workers (it sets the global batch) and every resolved
    field of the configuration but those in `not_identity`, which cannot change the result
    (loader workers, log intervals). The fully resolved configuration is hashed, not what differs
    from the defaults, so that a changed default cannot silently reuse an old result.
    """
    ignored = set(not_identity)
    content = {
        "recipe": recipe,
        "workers": workers,
        "config": {key: value for key, value in config.items() if key not in ignored},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
