"""A worker that does what a script says, for tests of the study loop.

It keeps the process border of the real worker (environment in; attempt folder and exit code out)
and trains nothing. The script is `script.json` in the study's root: a list of rules, the first
whose `match` is a part of the trial's configuration applies. Rules with `adds` plant effects: all
that match are summed into the value.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ablate.records.attempt import AttemptWriter
from ablate.records.files import read_json, read_rows


def main() -> None:
    folder = Path(os.environ["ABLATE_TRIAL"])
    attempt = int(os.environ["ABLATE_ATTEMPT"])
    trial = read_json(folder / "trial.json")
    rules = json.loads((Path(trial["root"]) / "script.json").read_text())
    rule = choose(rules, trial["config"])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    if int(os.environ["RANK"]) != 0:
        return
    writer = AttemptWriter(folder, attempt)
    if rule.get("breaks"):
        raise RuntimeError("the script says break before the first step")
    reached = max((int(p.name) for p in folder.glob("reached/*")), default=0)
    evals = rule.get("evals", {})
    for step in range(reached + 1, rule.get("steps", 2) + 1):
        writer.step([{"step": step, "attempt": attempt, "time": time.time(), "loss": 1.0 / step}])
        writer.heartbeat({"attempt": attempt, "step": step, "steps_total": rule.get("steps", 2)})
        if str(step) in evals:
            writer.evaluation({"step": step, "imagenet_top1": evals[str(step)]})
        while str(step) in evals and not judged(folder, step):
            time.sleep(0.01)
            if stopped:
                break
        if rule.get("checkpoints"):
            (folder / "reached" / str(step)).mkdir(parents=True)
        if str(step) in evals and wait_for_stop(folder, stopped):
            writer.result({"status": "stopped", "step": step})
            sys.exit(75)
        if attempt <= rule.get("crashes", 0):
            raise RuntimeError("the script says crash")
        while rule.get("hold") and not (Path(trial["root"]) / "release").exists():
            if stopped:
                writer.result({"status": "stopped", "step": step})
                sys.exit(75)
            time.sleep(0.01)
    value = rule.get("value", 0.5) + 0.01 * trial["seed"] + effects(rules, trial["config"])
    status = rule.get("status", "completed")
    writer.evaluation({"step": rule.get("steps", 2), "imagenet_top1": value})
    writer.result(
        {
            "status": status,
            "step": rule.get("steps", 2),
            "final": {"imagenet_top1": value} if status == "completed" else {},
            "verdict": "DIVERGED" if status == "diverged" else "STABLE",
            "flags": [],
            "reason": rule.get("reason", ""),
        }
    )


def judged(folder: Path, step: int) -> bool:
    """The controller has seen the evaluation of this step."""
    rows = read_rows(folder.parent.parent / "rungs.jsonl")
    return any(row["trial"] == folder.name and row.get("step", -1) >= step for row in rows)


def wait_for_stop(folder: Path, stopped: list[bool]) -> bool:
    """Whether the controller ends this trial; waits for its signal if it has decided so."""
    rows = read_rows(folder.parent.parent / "rungs.jsonl")
    mine = [row.get("decision") for row in rows if row["trial"] == folder.name]
    while mine[-1:] == ["prune"] and not stopped:
        time.sleep(0.01)
    return bool(stopped)


def choose(rules: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    for rule in rules:
        if "adds" not in rule and rule.get("match", {}).items() <= config.items():
            return rule
    return {}


def effects(rules: list[dict[str, Any]], config: dict[str, Any]) -> float:
    """The sum over all rules of the form {match, adds} that apply: a planted response."""
    return sum(
        rule["adds"] for rule in rules if "adds" in rule and rule["match"].items() <= config.items()
    )
