"""The contract of a sink."""

from __future__ import annotations

import time
from typing import ClassVar

from ablate.errors import TrackingError
from ablate.runner.status import StudyStatus
from ablate.tracking.sinks import open_sink, telling


class SinkContract:
    """What holds of every sink: a file in ``ablate/tracking/sinks/`` found by a URL's scheme."""

    url: ClassVar[str]
    """Where nobody listens: a sink must be opened, and must be able to fail."""
    status: ClassVar[StudyStatus]
    """Any."""
    wrong: ClassVar[tuple[str, ...]] = ()
    """Addresses that it refuses when it is opened."""

    def test_opening_it_waits_for_nobody(self) -> None:
        """A sink is opened where its other end is away, and is closed again."""
        began = time.monotonic()
        open_sink(self.url).close()
        assert time.monotonic() - began < 5.0

    def test_an_address_that_cannot_work_is_refused(self) -> None:
        """At once, with what to write: before any trial starts."""
        for url in self.wrong:
            try:
                open_sink(url)
            except TrackingError as error:
                assert "write" in str(error), error
            else:
                raise AssertionError(f"{url} was taken")

    def test_its_trouble_is_nobodys(self) -> None:
        """Telling it a hundred times returns at once, and leaving it takes seconds."""
        began = time.monotonic()
        with telling([self.url]) as sinks:
            for _ in range(100):
                sinks.update(self.status)
            assert time.monotonic() - began < 1.0
        assert time.monotonic() - began < 15.0
