"""A cluster in this process that does what a script says, a step at a time: nothing is started.

At every wait each running trial takes one step of its script, whose rules are those of `scripted`;
so the study loop can judge, prune and stop trials on their way, and a whole study costs a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import scripted

from ablate.cluster.contract import Attempt, Capacity, GangEvent, Shape
from ablate.records.attempt import AttemptWriter
from ablate.records.files import read_json

Rules = Callable[[], list[dict[str, Any]]]


class Stepping:
    """`gangs` seats. A rule says `steps`, `evals` on the way, `value`, `status` (completed or
    diverged), `crashes` (attempts that die at their first step) and `result` (more of its last
    word); rules match the configuration, and the seed as `seed`."""

    def __init__(self, gangs: int, rules: Rules) -> None:
        self.gangs = gangs
        self.rules = rules
        self.running: dict[str, tuple[Attempt, AttemptWriter, int]] = {}
        self.events: list[GangEvent] = []
        self.now = 0.0

    def clock(self) -> float:
        """Seconds of this cluster's own time."""
        return self.now

    def start(self, attempt: Attempt) -> None:
        reached = max((int(p.name) for p in attempt.folder.glob("reached/*")), default=0)
        writer = AttemptWriter(attempt.folder, attempt.number)
        self.running[attempt.trial_id] = (attempt, writer, reached)
        self._tell(attempt, "placed")

    def wait(self, timeout_s: float) -> list[GangEvent]:
        self.now += timeout_s
        for attempt, writer, step in list(self.running.values()):
            self._step(attempt, writer, step + 1)
        events, self.events = self.events, []
        return events

    def stop(self, trial_id: str, *, grace_s: float) -> None:
        attempt, writer, step = self.running.pop(trial_id)
        (attempt.folder / "reached" / str(step)).mkdir(parents=True, exist_ok=True)
        writer.result({"status": "stopped", "step": step})
        writer.close()
        self._tell(attempt, "exited", exit_codes=(75,), stopped=True)

    def capacity(self, shape: Shape) -> Capacity:
        return Capacity(self.gangs, self.gangs - len(self.running), "")

    def set_aside(self, node: str, shape: Shape) -> bool:
        return False

    def pids(self) -> dict[str, tuple[int, ...]]:
        return {}

    def close(self, *, grace_s: float = 0.0) -> None:
        pass

    def _step(self, attempt: Attempt, writer: AttemptWriter, step: int) -> None:
        trial = read_json(attempt.folder / "trial.json")
        rules, config = self.rules(), {**trial["config"], "seed": trial["seed"]}
        rule = scripted.choose(rules, config)
        if attempt.number <= rule.get("crashes", 0):
            writer.close()
            del self.running[attempt.trial_id]
            self._tell(attempt, "exited", exit_codes=(1,), failed_rank=0)
            return
        self.running[attempt.trial_id] = (attempt, writer, step)
        writer.step([{"step": step, "attempt": attempt.number, "time": 0.0, "loss": 1.0}])
        steps = rule.get("steps", 2)
        writer.heartbeat({"attempt": attempt.number, "step": step, "steps_total": steps})
        evals = rule.get("evals", {})
        if str(step) in evals:
            writer.evaluation({"step": step, "imagenet_top1": evals[str(step)]})
        if step < steps:
            return
        status = rule.get("status", "completed")
        value = rule.get("value", 0.5) + 0.01 * trial["seed"] + scripted.effects(rules, config)
        writer.evaluation({"step": step, "imagenet_top1": value})
        final = {"imagenet_top1": value} if status == "completed" else {}
        said = {"status": status, "step": step, "final": final, **rule.get("result", {})}
        writer.result(said)
        writer.close()
        del self.running[attempt.trial_id]
        self._tell(attempt, "exited", exit_codes=(0,))

    def _tell(self, attempt: Attempt, kind: Literal["placed", "exited"], **facts: Any) -> None:
        self.events.append(
            GangEvent(attempt.trial_id, attempt.number, kind, "", 0.0, ("here",), **facts)
        )
