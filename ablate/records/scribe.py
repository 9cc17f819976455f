"""Writes in the background, in order: a disk that hangs for a while holds nobody up but this."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_AHEAD = 4096
"""Writes that may wait; beyond that the one who has more waits too."""


class Scribe:
    """Does one write after the other in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(_AHEAD)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def write(self, write: Callable[[], None]) -> None:
        """Have `write` done behind those before it.

        Raises:
            Exception: what an earlier one raised; nothing was written since.
        """
        self._complain()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="scribe", daemon=True)
            self._thread.start()
        self._waiting.put(write)

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            Exception: what one of them raised.
        """
        self._waiting.join()
        self._complain()

    def close(self) -> None:
        """Write what is left, and end."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _complain(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (write := self._waiting.get()) is not None:
            try:
                if self._error is None:
                    write()
            except Exception as error:  # for the one who writes next
                self._error = error
            finally:
                self._waiting.task_done()
        self._waiting.task_done()
