"""A cluster of any size in one process, on its own clock: for tests of the study loop at scale.

It keeps the Cluster contract. A gang is a function that writes what a worker would leave behind
and says how long that took and how it ended; nothing sleeps, and a thousand gangs cost nothing.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ablate.cluster.contract import Attempt, Capacity, GangEvent, Shape
from ablate.errors import ClusterError
from ablate.records.attempt import AttemptWriter
from ablate.records.files import read_json
from ablate.study import Study, parse_study


@dataclass(frozen=True, slots=True)
class Course:
    """How a simulated attempt goes."""

    duration_s: float = 60.0
    exit_codes: tuple[int | None, ...] = (0,)
    kind: str = "exited"
    last_words: str = ""


def complete(attempt: Attempt) -> Course:
    """An attempt that takes one step, evaluates and completes; its value depends on the seed."""
    seed = read_json(attempt.folder / "trial.json")["seed"]
    writer = AttemptWriter(attempt.folder, attempt.number)
    writer.step([{"step": 1, "attempt": attempt.number, "time": 0.0, "loss": 1.0}])
    value = 0.5 + 0.01 * seed
    writer.evaluation({"step": 1, "imagenet_top1": value})
    writer.result(
        {"status": "completed", "step": 1, "final": {"imagenet_top1": value}, "verdict": "STABLE"}
    )
    writer.close()
    # Durations differ, so that ends come one by one as on a real cluster.
    return Course(60.0 + int(attempt.trial_id, 16) % 1000 / 10)


class SimulatedCluster:
    """`gangs` seats of one shape, on the machines of `seats` in turn. `act` is called when an
    attempt is placed; :attr:`machine_of` then says where."""

    def __init__(
        self,
        gangs: int,
        act: Callable[[Attempt], Course] = complete,
        *,
        seats: Sequence[str] = ("simulated",),
    ) -> None:
        self.gangs = gangs
        self.act = act
        self.machine_of: dict[str, str] = {}
        self._seats = [seats[number % len(seats)] for number in range(gangs)]
        self.now = 0.0
        self.most_running = 0
        self._running: dict[str, tuple[Attempt, int]] = {}
        self._queue: list[Attempt] = []
        self._ends: list[tuple[float, int, Attempt, Course]] = []
        self._events: list[GangEvent] = []
        self._ticket = itertools.count()
        self._aside: set[str] = set()

    def clock(self) -> float:
        """Seconds of this cluster's own time."""
        return self.now

    def start(self, attempt: Attempt) -> None:
        if attempt.trial_id in self._running or attempt in self._queue:
            raise ClusterError(f"trial {attempt.trial_id} is queued or running already")
        self._queue.append(attempt)
        self._place()

    def wait(self, timeout_s: float) -> list[GangEvent]:
        if not self._events:
            until = self.now + timeout_s
            if self._ends and self._ends[0][0] <= until:
                self.now, _, attempt, course = heapq.heappop(self._ends)
                self._end(attempt, course)
            else:
                self.now = until
        events, self._events = self._events, []
        return events

    def stop(self, trial_id: str, *, grace_s: float) -> None:
        if trial_id in self._running:
            attempt, _ = self._running[trial_id]
            self._ends = [end for end in self._ends if end[2] is not attempt]
            heapq.heapify(self._ends)
            self._end(attempt, Course(0.0, (75,)), stopped=True)
        for attempt in [a for a in self._queue if a.trial_id == trial_id]:
            self._queue.remove(attempt)
            self._tell(attempt, Course(0.0, (None,)), stopped=True)

    def capacity(self, shape: Shape) -> Capacity:
        return Capacity(self.gangs, self.gangs - len(self._running), "")

    def set_aside(self, node: str, shape: Shape) -> bool:
        taken = list(self.machine_of.values())
        left = [seat for seat in (*self._seats, *taken) if seat != node]
        if not left:
            return False
        self.gangs = len(left)
        self._seats = [seat for seat in self._seats if seat != node]
        self._aside.add(node)
        return True

    def pids(self) -> dict[str, tuple[int, ...]]:
        return {}

    def close(self, *, grace_s: float = 0.0) -> None:
        for trial_id in list(self._running):
            self.stop(trial_id, grace_s=grace_s)

    def _place(self) -> None:
        while self._queue and self._seats:
            attempt = self._queue.pop(0)
            machine = self.machine_of[attempt.trial_id] = self._seats.pop(0)
            ticket = next(self._ticket)
            self._running[attempt.trial_id] = (attempt, ticket)
            self.most_running = max(self.most_running, len(self._running))
            self._events.append(
                GangEvent(attempt.trial_id, attempt.number, "placed", "", 0.0, (machine,))
            )
            course = self.act(attempt)
            heapq.heappush(self._ends, (self.now + course.duration_s, ticket, attempt, course))

    def _end(self, attempt: Attempt, course: Course, *, stopped: bool = False) -> None:
        del self._running[attempt.trial_id]
        self._tell(attempt, course, stopped=stopped)
        self._place()

    def _tell(self, attempt: Attempt, course: Course, *, stopped: bool) -> None:
        machine = self.machine_of.pop(attempt.trial_id, None)
        if machine is not None and machine not in self._aside:
            self._seats.append(machine)
        kind = "lost" if course.kind == "lost" else "exited"
        self._events.append(
            GangEvent(
                attempt.trial_id,
                attempt.number,
                kind,  # type: ignore[arg-type]
                f"exit codes {course.exit_codes} {course.last_words}".strip(),
                0.0,
                () if machine is None else (machine,),
                exit_codes=course.exit_codes,
                failed_rank=0 if course.exit_codes == (1,) else None,
                stopped=stopped,
            )
        )


class Nobody:
    """A mirror that nobody looks at."""

    trouble = None

    def update(self, trials: object, active: object) -> None:
        pass


def factorial(tmp_path: Path, *, cells: int, seeds: int) -> Study:
    """A full factorial of `cells` cells, a multiple of ten, with `seeds` seeds each."""
    val = tmp_path / "val"
    for name in ("cat", "dog"):
        (val / name).mkdir(parents=True, exist_ok=True)
    (val / "classnames.json").write_text('["cat", "dog"]')
    (val / "templates.json").write_text('["a photo of a {}."]')
    lrs = [f"{1e-3 * (1 + i / 1000):.6g}" for i in range(cells // 10)]
    text = f"""\
name: factorial-{cells}-{seeds}
recipe: openclip
baseline: {{model: tiny-rn-a, train_data: t.tar, imagenet_val: val, lr: {lrs[0]}, beta2: 0.9}}
factors:
  lr: [{", ".join(lrs)}]
  beta2: [{", ".join(f"0.9{i}" for i in range(10))}]
design: full_factorial
seeds: [{", ".join(map(str, range(seeds)))}]
"""
    return parse_study(text, path="s.yaml", root=tmp_path)
