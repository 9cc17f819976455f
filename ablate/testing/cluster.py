"""The contract of a cluster.

::

    class TestMine(ablate.testing.ClusterContract):
        workers = 2

        @pytest.fixture
        def cluster(self):
            with MyCluster() as cluster:
                yield cluster
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import ClassVar

from ablate.cluster.contract import Attempt, Cluster, GangEvent, Shape
from ablate.errors import ClusterError, PlacementError
from ablate.records.folder import TrialRecord
from ablate.trial.recipe import load

ENDS = "gc:enable"
"""An entry that ends at once: a function of no arguments that returns nothing."""
WAITS = "signal:pause"
"""One that ends with SIGTERM."""
FAILS = "no_such_module:main"
_SAYS = """python -c "print('{\\"step\\": 1, \\"score\\": 0.5}')" """

TIMEOUT_S = 60.0


class ClusterContract:
    """What holds of every cluster (:class:`ablate.cluster.contract.Cluster`); `cluster` is a
    fixture that gives an empty one."""

    workers: ClassVar[int] = 2
    """A gang that it can hold; one of a thousand times as many it cannot."""

    def test_an_attempt_is_placed_and_ends_once(self, cluster: Cluster, tmp_path: Path) -> None:
        """Placed, then exited with every exit code; nothing of it is left, and nothing follows."""
        cluster.start(self._attempt(tmp_path, ENDS))
        first, last = _follow(cluster)
        assert (first.kind, last.kind) == ("placed", "exited")
        assert last.exit_codes == (0,) * self.workers and last.failed_rank is None
        assert not last.stopped and len(first.pids) == len(first.nodes) == self.workers
        assert cluster.pids() == {} and cluster.wait(0) == []

    def test_a_trial_runs_to_its_result(self, cluster: Cluster, tmp_path: Path) -> None:
        """The ranks find their trial, and each other's number, in their environment alone."""
        folder = tmp_path / "a"
        folder.mkdir()
        config = load("command").Config(command=_SAYS, metrics={"score": {}})
        content = {
            "format": 1,
            "id": "a",
            "seed": 0,
            "recipe": "command",
            "config": config.model_dump(mode="json"),
            "gang": {"workers": self.workers},
            "objective": {"metric": "score", "direction": "maximize"},
            "root": str(tmp_path),
        }
        (folder / "trial.json").write_text(json.dumps(content))
        cluster.start(Attempt("a", 1, folder, Shape(workers=self.workers)))
        last = _follow(cluster)[-1]
        assert last.exit_codes == (0,) * self.workers, last.detail
        result = TrialRecord(folder).result(1)
        assert result is not None and result["final"]["score"] == 0.5

    def test_a_rank_that_fails_ends_its_gang(self, cluster: Cluster, tmp_path: Path) -> None:
        """The last event names a rank, and one sentence for people."""
        cluster.start(self._attempt(tmp_path, FAILS))
        last = _follow(cluster)[-1]
        assert last.kind == "exited" and last.failed_rank is not None
        assert last.exit_codes[last.failed_rank] == 1 and last.detail
        assert cluster.pids() == {}

    def test_a_trial_is_here_once_and_can_be_stopped(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        """A second attempt is refused while the first waits or runs; stopped, it ends once."""
        cluster.start(self._attempt(tmp_path, WAITS))
        try:
            cluster.start(self._attempt(tmp_path, ENDS, number=2))
        except ClusterError as error:
            assert "queued" in str(error) or "running" in str(error)
        else:
            raise AssertionError("the same trial was started twice")
        cluster.stop("a", grace_s=5.0)
        last = _follow(cluster)[-1]
        assert last.kind == "exited" and last.stopped and last.number == 1
        cluster.stop("a", grace_s=0.0)
        assert cluster.pids() == {} and cluster.wait(0) == []

    def test_what_can_never_be_placed_is_refused(self, cluster: Cluster, tmp_path: Path) -> None:
        """start() and capacity() say why; what fits has room and no reason."""
        fits, never = Shape(workers=self.workers), Shape(workers=1000 * self.workers)
        capacity = cluster.capacity(fits)
        assert capacity.total >= 1 and 0 <= capacity.free <= capacity.total
        assert capacity.reason == ""
        capacity = cluster.capacity(never)
        assert capacity.total == capacity.free == 0 and capacity.reason
        try:
            cluster.start(Attempt("a", 1, tmp_path, never))
        except PlacementError as error:
            assert capacity.reason in str(error)
        else:
            raise AssertionError("it was queued")

    def _attempt(self, tmp_path: Path, entry: str, *, number: int = 1) -> Attempt:
        folder = tmp_path / "a"
        folder.mkdir(exist_ok=True)
        return Attempt("a", number, folder, Shape(workers=self.workers), entry)


def _follow(cluster: Cluster) -> list[GangEvent]:
    """All events until the last one."""
    events: list[GangEvent] = []
    deadline = time.monotonic() + TIMEOUT_S
    while not events or events[-1].kind == "placed":
        assert time.monotonic() < deadline, f"no last event; so far {events}"
        events += cluster.wait(0.1)
    return events
