"""Which machines fail what others may run: a driver that is gone, a package that is missing.

An attempt that fails before its first step is free again at once, so a broken machine would take
most of the tries of every trial. A trial that fails so on several machines is itself at fault.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TRIALS = 3
"""A machine is suspected when so many different trials failed on it and on no other before their
first step, and none has taken a step on it meanwhile."""


_SICK = re.compile(
    r"uncorrectable (ECC|NVLink)|fallen off the bus|GPU is lost|\bXid\b|"
    r"nvidia-smi does not answer|busy or unavailable",
    re.I,
)
"""What drivers say of a broken accelerator, at whatever step; no setting brings it about."""


def culprit(end: Mapping[str, Any]) -> str | None:
    """The machine on which an attempt failed before its first step, from its end.json; None where
    it did not, or that cannot be said."""
    if end["kind"] not in ("crashed", "lost") or end["step"]:
        return None
    return _where(end)


def _where(end: Mapping[str, Any]) -> str | None:
    nodes: Sequence[str] = end.get("nodes") or ()
    failed: int | None = end.get("failed_rank")
    if failed is not None and nodes:
        return nodes[failed]
    return nodes[0] if len(set(nodes)) == 1 else None


@dataclass(slots=True)
class Suspects:
    """What the attempts of one launch say about its machines."""

    machines: set[str] = field(default_factory=set)
    """All that ever held a rank."""
    failed: dict[str, set[str]] = field(default_factory=dict)
    """Trial -> the machines on which it failed before its first step."""
    in_a_row: dict[str, set[str]] = field(default_factory=dict)
    """Machine -> the trials that failed so on it since a step was last taken there."""
    sick: Counter[str] = field(default_factory=Counter)
    """Machine -> attempts that ended there by a broken accelerator; work on its others says nothing
    against that."""

    def note(self, trial_id: str, end: Mapping[str, Any]) -> str | None:
        """Take down how an attempt ended; the machine that is suspected because of it, if any."""
        if end["kind"] in ("crashed", "lost") and _SICK.search(end.get("detail") or ""):
            broken = _where(end)
            if broken is not None:
                self.sick[broken] += 1
                if self.sick[broken] >= TRIALS:
                    return broken
        if end["step"]:
            for worked in end.get("nodes") or ():
                self.in_a_row.pop(worked, None)
        node = culprit(end)
        if node is None:
            return None
        self.failed.setdefault(trial_id, set()).add(node)
        self.in_a_row.setdefault(node, set()).add(trial_id)
        only_here = [trial for trial in self.in_a_row[node] if self.failed[trial] == {node}]
        return node if len(only_here) >= TRIALS else None
