"""What a trial's rows say of how well its machines were used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ablate.words import counted, percent

STARVED = 0.2
"""Share of the time of its steps that waits for data, from which a trial is named: a fifth of what
its machines cost."""


def slowed_cards(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Cards that were slowed in any of these looks, with the causes: ``card 0 by heat, power``."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for key in row:
            card, is_cause, cause = key.removeprefix("system/gpu_").partition("_slowed_by_")
            if is_cause:
                found.setdefault(card, {})[cause] = None
    return tuple(f"card {card} by {', '.join(causes)}" for card, causes in sorted(found.items()))


@dataclass(slots=True)
class DataWait:
    """How long steps waited for data. The first step of each attempt is left out: everything starts
    there."""

    waited_s: float = 0.0
    whole_s: float = 0.0
    attempt: int | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a step, in the order in which they were done."""
        if row.get("attempt") != self.attempt:
            self.attempt = row.get("attempt")
        elif "data_time_s" in row and "step_time_s" in row:
            self.waited_s += row["data_time_s"]
            self.whole_s += row["step_time_s"]

    @property
    def share(self) -> float | None:
        """Of the steps' time; None where nothing tells."""
        return self.waited_s / self.whole_s if self.whole_s else None


def data_wait(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of the time of a trial's steps that waited for data."""
    wait = DataWait()
    for row in rows:
        wait.add(row)
    return wait.share


class Used(Protocol):
    """How well the machines of a trial were used."""

    @property
    def data_wait(self) -> float | None:
        """Share of its steps' time that waited for data; None where it is not known."""

    @property
    def slowed(self) -> tuple[str, ...]:
        """As :func:`slowed_cards` gives it."""


def describe_machines(trials: Mapping[str, Used]) -> str:
    """Which trials, by their names, waited for data for at least the share STARVED of their steps'
    time, and which had cards that were slowed; nothing where none did."""
    told = []
    waits = {name: trial.data_wait or 0.0 for name, trial in trials.items()}
    if starved := [name for name, share in waits.items() if share >= STARVED]:
        worst = max(starved, key=waits.__getitem__)
        told.append(
            f"{len(starved)} of {counted(len(trials), 'trial')} waited for data for "
            f"{percent(STARVED)} or more of their steps' time, most of all {worst} "
            f"({percent(waits[worst])}); more data workers, where there are cores for them, would "
            "shorten that."
        )
    if hot := [name for name, trial in trials.items() if trial.slowed]:
        told.append(
            f"{len(hot)} of {counted(len(trials), 'trial')} had accelerators that lowered their "
            f"clocks: {hot[0]} ({', '.join(trials[hot[0]].slowed)})"
            + (f", and {len(hot) - 1} more." if len(hot) > 1 else ".")
        )
    return " ".join(told)
