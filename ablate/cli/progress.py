"""What a verb is busy with, shown where that takes longer than two seconds."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_SILENT_S = 2.0
"""What takes less says nothing."""

_LINE_S = 10.0
"""Time between two lines where there is no terminal."""


class Work:
    """What is done now; told by who does it, shown by a thread."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = self.total = 0

    def begin(self, what: str) -> None:
        """Go on to something else, whose parts are not counted yet."""
        self.what, self.done, self.total = what, 0, 0

    def count(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def counter(self, what: str) -> Callable[[int, int], None]:
        """:meth:`count`, for something that begins with its first call."""

        def tell(done: int, total: int) -> None:
            self.what, self.done, self.total = what, done, total

        return tell

    def __str__(self) -> str:
        return f"{self.what}: {self.done} of {self.total}" if self.total else self.what


@contextmanager
def showing(console: Console, what: str) -> Iterator[Work]:
    """Show `what` goes on, on standard error: a bar on a terminal, else a line now and then."""
    work, ended = Work(what), threading.Event()
    show = _draw if console.is_terminal else _print
    thread = threading.Thread(target=show, args=(console, work, ended), daemon=True)
    thread.start()
    try:
        yield work
    finally:
        ended.set()
        thread.join()


def lines(console: Console, what: str) -> Callable[[int, int], None]:
    """What prints how far something is, where it is called for longer than two seconds."""
    due = math.inf
    told = (0, 0)

    def tell(done: int, total: int) -> None:
        nonlocal due, told
        now = time.monotonic()
        due = min(due, now + _SILENT_S)
        if now >= due and told != (done, total):
            console.print(f"{what}: {done} of {total}", markup=False, soft_wrap=True)
            due = now + _LINE_S
            told = (done, total)

    return tell


def _draw(console: Console, work: Work, ended: threading.Event) -> None:
    if ended.wait(_SILENT_S):
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(work.what, total=None)
        while not ended.wait(0.2):
            total = work.total or None
            bar.update(task, description=work.what, completed=work.done, total=total)


def _print(console: Console, work: Work, ended: threading.Event) -> None:
    pause_s = _SILENT_S
    while not ended.wait(pause_s):
        console.print(str(work), markup=False, soft_wrap=True)
        pause_s = _LINE_S
