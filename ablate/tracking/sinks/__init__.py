"""Sinks: what is told how a study stands, from outside of it. Found by their URL's scheme.

A sink is one file in this folder with ``SCHEMES`` and ``open(url)``; what that returns is told the
study's status every few turns. Each has a thread of its own: one that raises or hangs is noticed
by nobody but the log.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol

from ablate.errors import TrackingError, suggest
from ablate.records.masking import reason_of
from ablate.runner.status import StudyStatus

log = logging.getLogger("ablate")

_CLOSE_S = 5.0
"""Most time that the end of a launch waits for a sink."""


class Sink(Protocol):
    """Is told how a study stands; may raise, and may take its time."""

    def update(self, status: StudyStatus) -> None:
        """The status now; the first is that before anything ran, and some may be left out."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


@contextmanager
def telling(urls: Sequence[str], env: Mapping[str, str] = os.environ) -> Iterator[Tellers]:
    """The sinks at `urls`, each in a thread of its own; ``env:NAME`` is the URL that NAME holds.

    Raises:
        TrackingError: no sink has such a scheme, a variable is not set, or an address is wrong.
    """
    found = Tellers([_Teller(open_sink(_resolved(url, env))) for url in urls])
    try:
        yield found
    finally:
        found.close()


def open_sink(url: str) -> Sink:
    """The sink that this URL's scheme names.

    Raises:
        TrackingError: none does, or it refuses the address.
    """
    scheme, found, _ = url.partition("://")
    sinks = _by_scheme()
    if not found or scheme not in sinks:
        raise TrackingError(f"notify: {scheme!r} is no scheme of a sink; {suggest(scheme, sinks)}")
    opened: Sink = sinks[scheme].open(url)
    return opened


def _by_scheme() -> dict[str, ModuleType]:
    """Every scheme that a file of this folder declares."""
    names = [item.name for item in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {scheme: module for module in modules for scheme in getattr(module, "SCHEMES", ())}


def _resolved(url: str, env: Mapping[str, str]) -> str:
    if not url.startswith("env:"):
        return url
    name = url.removeprefix("env:")
    if not env.get(name):
        raise TrackingError(f"notify: {url}, and {name} is not set here; export {name}=https://...")
    return env[name]


class Tellers:
    """Several sinks as one; nothing here waits or raises."""

    def __init__(self, tellers: Sequence[_Teller]) -> None:
        self._tellers = tellers

    def update(self, status: StudyStatus) -> None:
        for teller in self._tellers:
            teller.update(status)

    def close(self) -> None:
        for teller in self._tellers:
            teller.close()


class _Teller:
    """One sink and its thread: the first status and the newest reach it, those between may not."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._changed = threading.Condition()
        self._waiting: list[StudyStatus] = []
        self._begun = False
        self._closing = False
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="sink", daemon=True)
        self._thread.start()

    def update(self, status: StudyStatus) -> None:
        with self._changed:
            first = [] if self._begun else self._waiting[:1]  # what is new is new since then
            self._waiting = [*first, status]
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                waiting, self._waiting = self._waiting, []
                self._begun = self._begun or bool(waiting)
                closing = self._closing
            try:
                for status in waiting:
                    self._sink.update(status)
                if closing:
                    self._sink.close()
            except Exception as error:  # whatever it is, the study goes on without it
                if (reason := reason_of(error)) != self._trouble:
                    log.warning("notify: %s", reason)
                    self._trouble = reason
            if closing:
                return
