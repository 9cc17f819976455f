"""The study folder: the truth about a study, and the only reader and writer of it.

::

    runs/<study>/study.json
                 trials/<id>/trial.json             what is asked; never changes
                             outcome.json           what came of it; written last, by the controller
                             failed.json            an outcome that is tried again (or pruned.json)
                             checkpoints/step-000500/...
                             attempts/<k>/trace.jsonl    a row per optimizer step
                                          evals.jsonl    a row per evaluation
                                          answers.jsonl  a bit per image of each
                                          events.jsonl   what the markers saw
                                          machine.jsonl  what rank 0's machine did meanwhile
                                          gang.json      when it had fewer workers than asked
                                          heartbeat.json the latest numbers, for people
                                          result.json    the attempt's own last word
                                          learning.json  did it learn: last against first weights
                                          end.json       how the controller saw it end
                                          log-<rank>.txt what each rank printed
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate import __version__
from ablate.errors import RecordError
from ablate.records.files import (
    FORMAT,
    clear_leftovers,
    dumps,
    find_json,
    loads,
    read_json,
    read_rows,
    sync_folder,
    write_json,
)

MACHINES_FAULT = frozenset({"preempted", "lost"})
"""Ends of attempts (end.json, ``kind``) whose machine was wanted back, or broke."""
RUNGS = "rungs.jsonl"
"""What a search's pruning saw and decided, in a study folder."""


def _check_layout(path: Path, content: Mapping[str, Any]) -> None:
    written = content.get("format", FORMAT)
    if written != FORMAT:
        by = f", that of ablate {content['version']}" if "version" in content else ""
        raise RecordError(
            f"{path} has layout {written}{by}, and this version ({__version__}) reads {FORMAT}. "
            "Nothing is damaged: read and go on with it by the version that wrote it"
        )


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """Reads one trial folder."""

    folder: Path

    @property
    def trial_id(self) -> str:
        return self.folder.name

    def trial(self) -> dict[str, Any]:
        """trial.json: what is asked.

        Raises:
            RecordError: it is damaged, or of another layout.
        """
        path = self.folder / "trial.json"
        content: dict[str, Any] = read_json(path)
        _check_layout(path, content)
        return content

    def outcome(self) -> dict[str, Any] | None:
        """outcome.json, or None while the trial has none."""
        return find_json(self.folder / "outcome.json")

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far, ascending."""
        try:
            names = os.listdir(self.folder / "attempts")
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if name.isdigit())

    def attempt_folder(self, attempt: int) -> Path:
        return self.folder / "attempts" / str(attempt)

    def result(self, attempt: int) -> dict[str, Any] | None:
        """result.json of an attempt, or None when it ended without one."""
        return find_json(self.attempt_folder(attempt) / "result.json")

    def end(self, attempt: int) -> dict[str, Any] | None:
        """end.json of an attempt, or None when the controller never saw it end."""
        return find_json(self.attempt_folder(attempt) / "end.json")

    def learned(self) -> dict[str, Any] | None:
        """learning.json of the last attempt, or None when it has none."""
        last = max(self.attempts(), default=0)
        return find_json(self.attempt_folder(last) / "learning.json")

    def ends(self) -> list[dict[str, Any]]:
        """How the controller saw each attempt end; those it never saw end are left out."""
        seen = [self.end(attempt) for attempt in self.attempts()]
        return [end for end in seen if end is not None]

    def ends_that_count(self) -> list[dict[str, Any]]:
        """:meth:`ends` since the trial was last tried again on purpose (``failed.json``)."""
        failed = find_json(self.folder / "failed.json")
        before = int(failed["attempt"]) if failed else 0
        seen = [self.end(attempt) for attempt in self.attempts() if attempt > before]
        return [end for end in seen if end is not None]

    def error(self, attempt: int, rank: int | None) -> dict[str, Any] | None:
        """What the code of a rank raised at the end of an attempt, where that says something about
        the trial and not about its machine."""
        if rank is None:
            return None
        return find_json(self.attempt_folder(attempt) / f"error-{rank}.json")

    def fewer_workers(self, attempt: int) -> int | None:
        """How many workers an attempt had, where they were fewer than the trial asks for."""
        gang = find_json(self.attempt_folder(attempt) / "gang.json")
        return int(gang["workers"]) if gang else None

    def heartbeat(self, attempt: int) -> dict[str, Any] | None:
        """heartbeat.json of an attempt, or None before its first."""
        with contextlib.suppress(RecordError):
            return find_json(self.attempt_folder(attempt) / "heartbeat.json")
        return None

    def trace(self) -> list[dict[str, Any]]:
        """One row per optimizer step; steps that a later attempt ran again are its own."""
        return self._settled("trace.jsonl")

    def evaluations(self) -> list[dict[str, Any]]:
        """One row per evaluated step, like :meth:`trace`."""
        return self._settled("evals.jsonl")

    def machine(self) -> list[dict[str, Any]]:
        """What rank 0's machine did, a row every few seconds, like :meth:`trace`."""
        return self._settled("machine.jsonl")

    def answers(self) -> list[dict[str, Any]]:
        """Which images each evaluation got right, like :meth:`trace`."""
        return self._settled("answers.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """Marker events, each once: of those told again (by a resumed attempt, or because more
        is known about their end) the last telling counts."""
        seen: dict[tuple[Any, ...], dict[str, Any]] = {}
        for attempt in self.attempts():
            for row in read_rows(self.attempt_folder(attempt) / "events.jsonl"):
                evidence = row["evidence"]
                key = (row["marker"], evidence["kind"], evidence["quantity"], row["first_step"])
                seen[key] = row
        return sorted(seen.values(), key=lambda row: (row["first_step"], row["marker"]))

    def first_row(self, attempt: int) -> dict[str, Any] | None:
        """The first row of an attempt's trace, or None before its first step."""
        try:
            with open(self.attempt_folder(attempt) / "trace.jsonl", "rb") as file:
                line = file.readline()
        except FileNotFoundError:
            return None
        if not line.endswith(b"\n"):
            return None
        row: dict[str, Any] = loads(line)
        return row

    def num_images(self, metric: str) -> int | None:
        """Images that `metric` is a share of, by the last evaluation that told each of them."""
        for attempt in reversed(self.attempts()):
            row = self.last_row(attempt, name="answers.jsonl", window=1 << 20)
            if row is not None and metric in row["of"]:
                return int(row["of"][metric]["images"])
        return None

    def last_row(
        self, attempt: int, *, name: str = "trace.jsonl", window: int = 65_536
    ) -> dict[str, Any] | None:
        """The last whole row of an attempt's trace, or None before its first step.

        `window`: bytes of the file's end that are read.
        """
        try:
            with open(self.attempt_folder(attempt) / name, "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(file.tell() - window, 0))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            try:
                row = loads(line)
                int(row["step"])
            except (ValueError, KeyError, TypeError):
                continue  # torn
            return dict(row)
        return None

    def last_step(self, attempt: int) -> int:
        """The last optimizer step that an attempt recorded; 0 when it recorded none."""
        row = self.last_row(attempt)
        return int(row["step"]) if row else 0

    def steps_again(self, attempt: int) -> int:
        """How many steps an attempt did that the one before, whose machine was taken away or
        broke, had recorded."""
        first = self.first_row(attempt)
        if first is None or (self.end(attempt - 1) or {}).get("kind") not in MACHINES_FAULT:
            return 0
        known = min(self.last_step(attempt - 1), self.last_step(attempt))
        return max(known - int(first["step"]) + 1, 0)

    def seen_s(self, attempt: int) -> float:
        """Seconds from an attempt's start to its last heartbeat: what one took whose end nobody
        saw. The time of day, which may leap, has no part in it."""
        return float((self.heartbeat(attempt) or {}).get("wall_s", 0.0))

    def log_tail(self, attempt: int, *, lines: int = 15) -> str:
        """The last lines that a rank of an attempt printed: the one that failed first, if known.

        Else one whose log holds a traceback: the others only say that they lost a peer.
        """
        best = ""
        failed = (self.end(attempt) or {}).get("failed_rank")
        paths = sorted(self.attempt_folder(attempt).glob("log-*.txt"))
        for path in sorted(paths, key=lambda path: path.name != f"log-{failed}.txt"):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            tail = "\n".join(text.splitlines()[-lines:])
            if tail and (not best or ("Traceback" in tail and "Traceback" not in best)):
                best = f"{path}:\n{tail}"
        return best

    def _settled(self, name: str) -> list[dict[str, Any]]:
        """Rows that count: from an attempt's first step on, all of earlier attempts is void."""
        rows: dict[int, dict[str, Any]] = {}
        for attempt in self.attempts():
            folder = self.attempt_folder(attempt)
            first = self.first_row(attempt) if rows else None
            if first is not None:
                rows = {step: row for step, row in rows.items() if step < first["step"]}
            for row in read_rows(folder / name):
                rows[row["step"]] = row
        return [rows[step] for step in sorted(rows)]


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """Reads and writes one study folder (the controller's side of it)."""

    folder: Path

    def study(self) -> dict[str, Any] | None:
        """study.json, or None when nothing was launched here yet.

        Raises:
            RecordError: it is damaged, or of another layout.
        """
        path = self.folder / "study.json"
        content = find_json(path)
        if content is not None:
            _check_layout(path, content)
        return content

    def write_study(self, content: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        self.write(self.folder / "study.json", content)

    def trial_ids(self) -> set[str]:
        """Every trial that has a folder here."""
        try:
            return set(os.listdir(self.folder / "trials"))
        except FileNotFoundError:
            return set()

    def record(self, trial_id: str) -> TrialRecord:
        return TrialRecord(self.folder / "trials" / trial_id)

    def records(self) -> Iterator[TrialRecord]:
        """Every trial that was ever written here, in the order they were first asked for."""
        found = list((self.folder / "trials").glob("*/trial.json"))
        for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path)):
            yield TrialRecord(path.parent)

    def write_trial(self, content: Mapping[str, Any]) -> TrialRecord:
        """Write trial.json unless it is there: a trial is identified by what is asked."""
        record = self.record(str(content["id"]))
        if not (record.folder / "trial.json").exists():
            record.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.write(record.folder / "trial.json", content)
        return record

    def write(self, path: Path, content: Any, *, durable: bool = True) -> None:
        """Write one of the controller's JSON files; it writes none in another way."""
        write_json(path, content, durable=durable)

    def new_attempt(self, record: TrialRecord) -> int:
        """Reserve the next attempt's folder and give its number; no other attempt is alive."""
        clear_leftovers(record.folder)
        number = max(record.attempts(), default=0) + 1
        record.attempt_folder(number).mkdir(parents=True)
        return number

    def write_gang(self, record: TrialRecord, attempt: int, content: Mapping[str, Any]) -> None:
        """Write gang.json: an attempt has fewer workers than its trial asks for."""
        self.write(record.attempt_folder(attempt) / "gang.json", content)

    def write_end(self, record: TrialRecord, attempt: int, content: Mapping[str, Any]) -> None:
        """Write end.json: how an attempt ended, seen from outside; nothing of it is alive."""
        clear_leftovers(record.attempt_folder(attempt))
        self.write(record.attempt_folder(attempt) / "end.json", content)

    def log_rung(self, row: Mapping[str, Any]) -> None:
        """Append a row to rungs.jsonl: a score at a rung with what was decided, or a final one."""
        with open(self.folder / RUNGS, "ab") as log:
            log.write(dumps(row).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())

    def rungs(self) -> list[dict[str, Any]]:
        """Rows of rungs.jsonl, in the order in which they were decided."""
        return read_rows(self.folder / RUNGS)

    def reopen(self, record: TrialRecord, *, kept_as: str = "pruned.json") -> None:
        """Let a trial that was ended go on: its outcome is kept under another name."""
        os.replace(record.folder / "outcome.json", record.folder / kept_as)
        sync_folder(record.folder)

    def write_outcome(self, record: TrialRecord, content: Mapping[str, Any]) -> None:
        """Write outcome.json, the last file of a trial; only a pruned trial may be reopened."""
        assert not (record.folder / "outcome.json").exists(), f"{record.folder} has an outcome"
        clear_leftovers(record.folder)
        self.write(record.folder / "outcome.json", content)


def interrupted(ends: Iterable[Mapping[str, Any]], *, workers: int) -> dict[str, float]:
    """What machines that were taken away, or broke, cost attempts with these end.json.

    ``preempted`` and ``lost`` attempts, ``again``: steps that were trained before,
    ``again_worker_s``: worker-seconds of those. Only what is not 0.
    """
    total: dict[str, float] = {}

    def add(name: str, amount: float) -> None:
        total[name] = total.get(name, 0) + amount

    for end in ends:
        if end.get("kind") in MACHINES_FAULT:
            add(end["kind"], 1)
        if again := end.get("again"):
            made = end["step"] - end["first_step"] + 1
            add("again", again)
            add("again_worker_s", end["wall_s"] * end.get("workers", workers) * again / made)
    return total


def worker_seconds(ends: Iterable[Mapping[str, Any]], *, workers: int) -> float:
    """What attempts with these end.json took, of gangs of `workers` unless they say fewer."""
    return float(sum(end["wall_s"] * end.get("workers", workers) for end in ends))


def find_study(path: Path) -> StudyRecord:
    """The study folder at `path`.

    Raises:
        RecordError: there is none; names the studies that are near.
    """
    if (path / "study.json").exists():
        return StudyRecord(path)
    near = _nearby(path)
    hint = f"Found: {', '.join(near)}." if near else "Make one: ablate launch STUDY.yaml"
    raise RecordError(f"{path} holds no study (no study.json). {hint}")


def _nearby(path: Path) -> Sequence[str]:
    for folder in (path, path.parent, Path("runs")):
        if folder.is_dir():
            found = [str(p.parent) for p in sorted(folder.glob("*/study.json"))]
            if found:
                return found
    return []
