"""What one attempt of a trial leaves behind, written by rank 0 of its gang."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from ablate.records.files import dumps, write_json


class AttemptWriter:
    """What one attempt of a trial leaves behind; used by rank 0 of its gang alone."""

    def __init__(self, trial_folder: Path, attempt: int) -> None:
        self.folder = trial_folder / "attempts" / str(attempt)
        self.attempt = attempt
        self.folder.mkdir(parents=True, exist_ok=True)
        self._logs: dict[str, IO[bytes]] = {}
        self._began = time.monotonic()

    def step(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows of step measurements to trace.jsonl."""
        self._append("trace.jsonl", rows)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Append one row of evaluation measurements to evals.jsonl."""
        self._append("evals.jsonl", [row])

    def answers(self, row: Mapping[str, Any]) -> None:
        """Append to answers.jsonl which images an evaluation got right (:mod:`..answers`)."""
        self._append("answers.jsonl", [row])

    def event(self, row: Mapping[str, Any]) -> None:
        """Append one marker event to events.jsonl."""
        self._append("events.jsonl", [row])

    def machine(self, row: Mapping[str, Any]) -> None:
        """Append what the machine does meanwhile to machine.jsonl."""
        self._append("machine.jsonl", [row])

    def heartbeat(self, row: Mapping[str, Any]) -> None:
        """Replace heartbeat.json: the latest numbers, for people, and the seconds since the start,
        for an attempt whose end nobody sees."""
        wall_s = round(time.monotonic() - self._began, 3)
        write_json(self.folder / "heartbeat.json", {**row, "wall_s": wall_s}, durable=False)

    def sync(self) -> None:
        """Bring all rows so far to the disk; before a checkpoint that later rows go on from."""
        for log in self._logs.values():
            os.fsync(log.fileno())

    def result(self, row: Mapping[str, Any]) -> None:
        """Write result.json, the attempt's last word, after all its logs are on disk."""
        self.sync()
        write_json(self.folder / "result.json", row)

    def learning(self, row: Mapping[str, Any]) -> None:
        """Write learning.json, what the weights and features say; after the result is safe."""
        write_json(self.folder / "learning.json", row)

    def close(self) -> None:
        """Close the logs."""
        for log in self._logs.values():
            log.close()
        self._logs.clear()

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        log = self._logs.get(name)
        if log is None:
            log = self._logs[name] = open(self.folder / name, "ab")
        log.write(b"".join(dumps(row).encode() + b"\n" for row in rows))
        log.flush()
