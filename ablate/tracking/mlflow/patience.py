"""How long a mirror goes on when somebody waits for its end."""

from __future__ import annotations

import math
import time


class Abandoned(Exception):
    """The caller has stopped waiting: nothing more may be written."""


class Patience:
    """Endless until somebody waits; then it ends where nothing arrives, or nothing gets better.

    A slow MLflow is waited for as long as it takes; one that is away, or fails every round at the
    same place, for `seconds`.
    """

    def __init__(self) -> None:
        self._seconds = math.inf
        self._silent_until = math.inf
        self._stuck_until = math.inf

    def begin(self, seconds: float) -> None:
        """Somebody waits from now on."""
        self._seconds = seconds
        self.arrived()

    def end(self) -> None:
        """Nobody waits any more."""
        self._stuck_until = -math.inf

    def arrived(self) -> None:
        """Something has arrived at MLflow."""
        self._silent_until = time.monotonic() + self._seconds

    def failed(self) -> None:
        """A round has ended early."""
        self._stuck_until = min(self._stuck_until, time.monotonic() + self._seconds)

    def finished(self) -> None:
        """A trial stands in MLflow with all that will ever be told of it."""
        if self._stuck_until > 0:
            self._stuck_until = math.inf

    @property
    def is_over(self) -> bool:
        return time.monotonic() > min(self._silent_until, self._stuck_until)

    def look_on(self) -> None:
        """Go on.

        Raises:
            Abandoned: nobody waits any more.
        """
        if self.is_over:
            raise Abandoned
