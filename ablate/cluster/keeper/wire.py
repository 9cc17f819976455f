"""What a keeper and its client tell each other: one JSON object a line over a socket pair."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rank:
    """One process to fork: number in the gang, environment on top of the host's, log file."""

    rank: int
    env: Mapping[str, str]
    log: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How the ranks of one gang on one host ended: exit code by rank (negative: signal).

    ``failed`` is the first rank that ended out of order, None when none did or they were stopped;
    ``reason`` is why, where the exit code does not say it.
    """

    codes: Mapping[int, int]
    failed: int | None
    reason: str = ""
    stuck: str = ""
    """Processes that could not be killed; the machine is not to be used again."""


@dataclass(frozen=True, slots=True)
class Estate:
    """What a keeper clears up when it ends and finds the owner dead: processes, and a folder.

    Processes are named by pid and creation time, because pids are used again.
    """

    owner: tuple[int, float]
    processes: tuple[tuple[int, float], ...]
    folder: str


class HostLost(Exception):
    """The keeper, or the machine it runs on, is gone."""


def describe_code(code: int | None) -> str:
    """An exit code in words: ``exit code 3``, ``SIGKILL``."""
    if code is None:
        return "an unknown exit code"
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
