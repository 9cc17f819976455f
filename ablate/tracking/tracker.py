"""The thread that keeps MLflow up to date, so that nobody waits for it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

from ablate.analysis.results import Score
from ablate.masking import masked_url, reason_of
from ablate.records import StudyRecord
from ablate.study import Study
from ablate.tracking.mirror import Abandoned, Mirror
from ablate.tracking.store import checked, default_uri, load_tables
from ablate.trial import Trial

_PAUSE_S = 2.0
"""Time between two rounds of mirroring; a round that took longer is followed by as long a pause,
so that mirroring never takes more than half a core."""

_LONGEST_PAUSE_S = 60.0
"""Most time between two tries while MLflow cannot be reached."""


class Tracker:
    """Keeps MLflow up to date with one study folder, from a thread of its own.

    `score` gives the number a trial counts with (``design.score_of``). Without `uri` the mirror is
    an SQLite file and an artifact folder beside the study's; artifacts lie beside any SQLite file.
    With `fresh` what stands there of this study is deleted first.

    Raises:
        TrackingError: a URI that can never work. A server that is down is no error.
    """

    def __init__(
        self,
        study: Study,
        record: StudyRecord,
        *,
        score: Score,
        uri: str | None = None,
        fresh: bool = False,
    ) -> None:
        uri = checked(uri) if uri is not None else default_uri(record.folder.parent)
        self.trouble: str | None = None
        if not uri.startswith("http"):
            load_tables()
        self._uri = uri
        self._mirror = Mirror(study, record, score, uri, fresh, self._is_abandoned)
        self._changed = threading.Condition()
        self._trials: Sequence[Trial] = ()
        self._active: frozenset[str] = frozenset()
        self._touched: set[str] = set()
        self._news = False
        self._closing = False
        self._deadline = math.inf
        self._complete = False
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def update(self, trials: Sequence[Trial], active: Sequence[str]) -> None:
        """Tell what the study wants and which trials are being attempted; returns at once.

        `trials` only ever grows at its end.
        """
        with self._changed:
            self._trials, self._active = trials, frozenset(active)
            self._touched.update(active)
            self._news = True
            self._changed.notify()

    def close(self, *, timeout_s: float = 30.0) -> bool:
        """Mirror what is left, with the study's own files, and end; False if time ran out.

        Trials without an outcome are shown as stopped.
        """
        with self._changed:
            self._closing, self._deadline = True, time.monotonic() + timeout_s
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.trouble = self.trouble or f"MLflow at {masked_url(self._uri)} is slow"
        return self._complete

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        pause_s = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._closing)
                trials, active, closing = self._trials, self._active, self._closing
                touched, self._touched = self._touched, set()
                self._news = False
            begun = time.monotonic()
            try:
                self._mirror.update(trials, active, touched, closing=closing)
            except Abandoned:
                return
            except Exception as error:  # whatever it is, the study goes on without MLflow
                with self._changed:
                    self._touched |= touched
                    self._news = True
                self._mirror.forget()
                self.trouble = f"MLflow at {masked_url(self._uri)} is behind: {reason_of(error)}"
                pause_s = min(max(2 * pause_s, 1.0), _LONGEST_PAUSE_S)
            else:
                self.trouble = self._mirror.complaint
                pause_s = 0.0
                if closing:
                    self._complete = self.trouble is None
                    return
            took_s = time.monotonic() - begun
            with self._changed:
                if self._closing:
                    wait_s = min(max(pause_s, 0.1), 1.0)  # the caller waits: hurry
                    self._changed.wait(wait_s)
                else:
                    self._changed.wait_for(
                        lambda: self._closing, max(pause_s, min(took_s, _LONGEST_PAUSE_S), _PAUSE_S)
                    )
            if self._is_abandoned():
                return

    def _is_abandoned(self) -> bool:
        return time.monotonic() > self._deadline
