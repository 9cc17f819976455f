"""The thread that keeps MLflow up to date, so that nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ablate.analysis.results import Score
from ablate.records.folder import StudyRecord
from ablate.records.masking import masked_url, reason_of
from ablate.study import Study
from ablate.tracking.mlflow.mirror import Mirror
from ablate.tracking.mlflow.patience import Abandoned, Patience
from ablate.tracking.mlflow.refusal import not_reached, refusal_of
from ablate.tracking.mlflow.store import checked, default_uri, load_tables
from ablate.trial.identity import Trial

_PAUSE_S = 2.0
"""Time between two rounds of mirroring; a round that took longer is followed by as long a pause,
so that mirroring never takes more than half a core."""

_LONGEST_PAUSE_S = 60.0
"""Most time between two tries while MLflow cannot be reached."""

_LOOK_S = 0.1
"""Time between two looks of who waits for the end."""

_LAST_S = 1.0
"""What a request under way may still take when nobody waits any more."""


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
        self._patience = Patience()
        self._mirror = Mirror(study, record, score, uri, fresh, self._patience)
        self._changed = threading.Condition()
        self._trials: Sequence[Trial] = ()
        self._active: frozenset[str] = frozenset()
        self._touched: set[str] = set()
        self._news = False
        self._closing = False
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

    def close(
        self,
        *,
        patience_s: float = 30.0,
        tell: Callable[[int, int], None] = lambda done, total: None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Mirror what is left, with the study's own files, and end; whether MLflow holds it all.

        It takes as long as it takes: it is False where nothing has arrived for `patience_s`, or
        where `give_up` says so. `tell` is told how many trials were looked at, and of how many.
        Trials without an outcome are shown as stopped.
        """
        with self._changed:
            self._closing = True
            self._patience.begin(patience_s)
            self._changed.notify()
        try:
            while self._thread.is_alive() and not self._patience.is_over and not give_up():
                self._thread.join(_LOOK_S)
                tell(self._mirror.done, self._mirror.total)
        finally:
            if self._thread.is_alive():
                self._patience.end()
                self._thread.join(_LAST_S)  # what it is in the middle of
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
                self._patience.failed()
                refusal = refusal_of(self._uri, error)
                why = refusal or not_reached(self._uri, error) or reason_of(error)
                self.trouble = f"MLflow at {masked_url(self._uri)} is behind: {why}"
                if closing and refusal:
                    return  # it will say so for as long as anybody asks
                pause_s = min(max(2 * pause_s, 1.0), _LONGEST_PAUSE_S)
            else:
                complaint = self._mirror.complaint
                self.trouble = complaint and f"MLflow is behind: {complaint}"
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
            if self._patience.is_over:
                return
