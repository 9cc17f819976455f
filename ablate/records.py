"""The study folder: the truth about a study, and the only reader and writer of it.

::

    runs/<study>/study.json
                 trials/<id>/trial.json             what is asked; never changes
                             outcome.json           what came of it; written last, by the controller
                             checkpoints/step-000500/...
                             attempts/<k>/trace.jsonl    a row per optimizer step
                                          evals.jsonl    a row per evaluation
                                          events.jsonl   what the markers saw
                                          gang.json      when it had fewer workers than asked
                                          heartbeat.json the latest numbers, for people
                                          result.json    the attempt's own last word
                                          learning.json  did it learn: last against first weights
                                          end.json       how the controller saw it end
                                          log-<rank>.txt what each rank printed

Whole files are written under a temporary name, flushed to disk and renamed; logs of rows are
appended line by line, and a torn last line is not read. Non-finite numbers are findings, so they
survive as the strings "NaN", "Infinity" and "-Infinity" (JSON has no other way to hold them).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ablate.errors import RecordError

FORMAT = 1
"""Version of the folder's layout, written into trial.json and study.json."""

RUNGS = "rungs.jsonl"
"""What a search's pruning saw and decided, in a study folder."""

ROOM_S = 10.0
"""How long a file that matters waits for room on a full disk."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON text in which non-finite numbers stand as strings."""
    return json.dumps(_encode(value), indent=indent, allow_nan=False, ensure_ascii=False)


def loads(text: str | bytes) -> Any:
    """The inverse of :func:`dumps`."""
    return _decode(json.loads(text))


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write `value` so that a reader sees the old file or the whole new one, never a part.

    `durable` also flushes to disk, and waits a little when the disk is full, both of which a
    heartbeat can do without: a checkpoint that finds no room gives back what it took.
    """
    text = dumps(value, indent=1) + "\n"
    until = time.monotonic() + (ROOM_S if durable else 0.0)
    while True:
        try:
            return _replace(path, text, durable=durable)
        except OSError as error:
            if not is_full(error) or time.monotonic() >= until:
                raise
        time.sleep(0.1)


def is_full(error: OSError) -> bool:
    """The disk, or what this user may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _replace(path: Path, text: str, *, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def leftovers(folder: Path) -> list[Path]:
    """What writers that were killed left half-written, in `folder` and below it."""
    return sorted(folder.rglob(".*.tmp"))


def clear_leftovers(folder: Path) -> None:
    """Remove the :func:`leftovers` of a folder in which nobody writes."""
    for path in leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read a file written by :func:`write_json`.

    Raises:
        RecordError: the file is not JSON, which no crash of ours can cause.
        FileNotFoundError: it is not there.
    """
    try:
        return loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(
            f"{path} is damaged ({error}). Move it away and launch again: "
            "the trial goes on from its last checkpoint."
        ) from error


def find_json(path: Path) -> dict[str, Any] | None:
    """As :func:`read_json`, or None when the file is not there."""
    try:
        content: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return None
    return content


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a torn last line (a crash while writing) is left out.

    A missing file has no rows.
    """
    rows, _ = read_rows_from(path, 0)
    return rows


def read_rows_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Rows that were appended after byte `offset`, and the offset to go on from."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data.rfind(b"\n") + 1
    rows = []
    for line in data[:whole].splitlines():
        try:
            row = loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # torn by a crash, then appended to: the row is lost, the log is not
        if isinstance(row, dict):
            rows.append(row)
    return rows, offset + whole


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

    def event(self, row: Mapping[str, Any]) -> None:
        """Append one marker event to events.jsonl."""
        self._append("events.jsonl", [row])

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


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """Reads one trial folder."""

    folder: Path

    @property
    def trial_id(self) -> str:
        return self.folder.name

    def trial(self) -> dict[str, Any]:
        """trial.json: what is asked."""
        content: dict[str, Any] = read_json(self.folder / "trial.json")
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

    def last_row(self, attempt: int) -> dict[str, Any] | None:
        """The last whole row of an attempt's trace, or None before its first step."""
        try:
            with open(self.attempt_folder(attempt) / "trace.jsonl", "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(file.tell() - 65_536, 0))
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
            first = self.first_row(attempt)
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
        """study.json, or None when nothing was launched here yet."""
        return find_json(self.folder / "study.json")

    def write_study(self, content: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        write_json(self.folder / "study.json", content)

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
            write_json(record.folder / "trial.json", content)
        return record

    def new_attempt(self, record: TrialRecord) -> int:
        """Reserve the next attempt's folder and give its number; no other attempt is alive."""
        clear_leftovers(record.folder)
        number = max(record.attempts(), default=0) + 1
        record.attempt_folder(number).mkdir(parents=True)
        return number

    def write_gang(self, record: TrialRecord, attempt: int, content: Mapping[str, Any]) -> None:
        """Write gang.json: an attempt has fewer workers than its trial asks for."""
        write_json(record.attempt_folder(attempt) / "gang.json", content)

    def write_end(self, record: TrialRecord, attempt: int, content: Mapping[str, Any]) -> None:
        """Write end.json: how an attempt ended, seen from outside; nothing of it is alive."""
        clear_leftovers(record.attempt_folder(attempt))
        write_json(record.attempt_folder(attempt) / "end.json", content)

    def log_rung(self, row: Mapping[str, Any]) -> None:
        """Append a row to rungs.jsonl: a score at a rung with what was decided, or a final one."""
        with open(self.folder / RUNGS, "ab") as log:
            log.write(dumps(row).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())

    def rungs(self) -> list[dict[str, Any]]:
        """Rows of rungs.jsonl, in the order in which they were decided."""
        return read_rows(self.folder / RUNGS)

    def reopen(self, record: TrialRecord) -> None:
        """Let a trial that was ended early go on: its outcome becomes pruned.json."""
        os.replace(record.folder / "outcome.json", record.folder / "pruned.json")
        sync_folder(record.folder)

    def write_outcome(self, record: TrialRecord, content: Mapping[str, Any]) -> None:
        """Write outcome.json, the last file of a trial; only a pruned trial may be reopened."""
        assert not (record.folder / "outcome.json").exists(), f"{record.folder} has an outcome"
        clear_leftovers(record.folder)
        write_json(record.folder / "outcome.json", content)


def worker_seconds(ends: Iterable[Mapping[str, Any]], *, workers: int) -> float:
    """What attempts with these end.json took, of gangs of `workers` unless they say fewer."""
    return float(sum(end["wall_s"] * end.get("workers", workers) for end in ends))


def free_gib(folder: Path) -> float:
    """GiB of disk that are free where `folder` is, or will be."""
    existing = next(path for path in [folder, *folder.resolve().parents] if path.exists())
    return shutil.disk_usage(existing).free / 2**30


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
