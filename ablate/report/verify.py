"""Whether a study folder keeps what is promised, whatever died while it was written.

============  =====================================================================================
complete      every trial that the study asks for has one outcome
one_winner    the outcome is the last word of the trial's last attempt, the only one that ended
steps         recorded steps have no gap, and a step that was run again gave the same numbers
known_fault   no number is touched by a fault of an earlier version that has been mended since
same_report   two studies have the same report, bit for bit, outside of its cost section
no_remains    no process of the study lives and no half-written file lies about
============  =====================================================================================

The report is compared by the digest of its core (:mod:`ablate.report.report`): wall times,
attempts and crash logs legitimately differ between a run that was interrupted and one that was
not; they stand in the cost section, which the digest leaves out. Everything else must be equal.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from ablate.errors import RecordError
from ablate.records.files import dumps, leftovers, read_rows
from ablate.records.folder import StudyRecord, TrialRecord
from ablate.study import Study
from ablate.trial.identity import Outcome, Trial
from ablate.trial.recipe import find_ability

Rule = Literal["complete", "one_winner", "steps", "known_fault", "same_report", "no_remains"]

CLOCKED = frozenset(
    {"time", "step_time_s", "data_time_s", "samples_per_s", "eval_time_s", "attempt"}
)
"""Fields of a row that depend on the clock, or on who wrote it."""

_CORE = ("effects.csv", "trials.csv", "effects.tex", "verdicts.json")


@dataclass(frozen=True, slots=True)
class Violation:
    """One promise that is not kept."""

    rule: Rule
    where: str
    """Trial id, or a path."""
    message: str


def verify(record: StudyRecord, trials: Sequence[Trial], *, metric: str) -> list[Violation]:
    """Check the records of `trials`, which are what the study asks for.

    `metric` is the study's objective. Reads every trace; nothing is written.
    """
    found: list[Violation] = []
    for trial in trials:
        folder = record.record(trial.id)
        checks: dict[Rule, Iterator[str]] = {
            "complete": _check_outcome(folder),
            "one_winner": _check_winner(folder, metric),
            "steps": _check_steps(folder),
            "known_fault": _check_faults(folder, trial),
        }
        for rule, messages in checks.items():
            try:
                found += [Violation(rule, trial.id, message) for message in messages]
            except RecordError as error:  # a file is damaged; the message names it
                found.append(Violation(rule, trial.id, str(error)))
    return found


def _check_outcome(trial: TrialRecord) -> Iterator[str]:
    outcome = trial.outcome()
    if outcome is None:
        yield "has no outcome"
    elif outcome["outcome"] not in set(Outcome):
        yield f"has the unknown outcome {outcome['outcome']!r}"
    elif (outcome["outcome"] == Outcome.COMPLETED) != (outcome["value"] is not None):
        yield f"is {outcome['outcome']} with value {outcome['value']}"


def _check_winner(trial: TrialRecord, metric: str) -> Iterator[str]:
    attempts = trial.attempts()
    for attempt in attempts:
        writers = {row.get("attempt", attempt) for row in _rows(trial, attempt)}
        if writers - {attempt}:
            yield f"attempt {attempt} holds rows of attempts {sorted(writers - {attempt})}"
    outcome = trial.outcome()
    if outcome is None or outcome["outcome"] not in set(Outcome):
        return
    if not attempts or outcome["attempt"] != attempts[-1]:
        yield f"its outcome is of attempt {outcome['attempt']}, and its attempts are {attempts}"
        return
    ended = [n for n in attempts if (trial.end(n) or {}).get("kind") == "ended"]
    if not Outcome(outcome["outcome"]).scored:
        if len(ended) > 1:
            yield f"attempts {ended} all ended"
        return
    if ended != attempts[-1:]:
        yield f"the attempts that ended are {ended}, and the last is {attempts[-1]}"
    result = trial.result(attempts[-1])
    if result is None:
        yield f"attempt {attempts[-1]} has an outcome and no result.json"
        return
    if outcome["outcome"] != result["status"] or outcome.get("final") != result.get("final"):
        yield f"its outcome is not what attempt {attempts[-1]} said"
    if outcome["value"] is not None:
        said = (result.get("final") or {}).get(metric)
        rows = [row[metric] for row in trial.evaluations() if metric in row]
        if outcome["value"] != said or rows[-1:] != [said]:
            yield (
                f"its value is {outcome['value']!r}, its result says {said!r} and its last "
                f"evaluation {rows[-1:]}"
            )


def _check_steps(trial: TrialRecord) -> Iterator[str]:
    attempts = trial.attempts()
    if attempts and "origin" in trial.trial():
        return  # an imported run has the steps that its maker chose to log
    result = trial.result(attempts[-1]) if attempts else None
    every = (result or {}).get("row_interval", 1)  # None: nothing was promised
    steps = [row["step"] for row in trial.trace()]
    last = max((*steps, *(row["step"] for row in trial.evaluations())), default=0)
    if every is not None:
        begin = 0 if steps[:1] == [0] else every  # a program may count from 0
        missing = sorted({*range(begin, last + 1, every)} - set(steps))
        if missing:
            yield f"steps {missing[:5]} of {last} are missing"
    outcome = trial.outcome()
    if outcome is not None and outcome["outcome"] in (Outcome.COMPLETED, Outcome.DIVERGED):
        if "step" in outcome and last != outcome["step"]:
            yield f"{last} steps are recorded, and the outcome is of step {outcome['step']}"
    for name in ("trace.jsonl", "evals.jsonl"):
        first: dict[int, tuple[int, str]] = {}
        for attempt in trial.attempts():
            for row in read_rows(trial.attempt_folder(attempt) / name):
                before, told = first.setdefault(row["step"], (attempt, _measured(row)))
                if told != _measured(row):
                    yield (
                        f"step {row['step']} of {name} differs between attempts {before} and "
                        f"{attempt}: {_first_difference(told, _measured(row))}"
                    )
                    break


def _check_faults(folder: TrialRecord, trial: Trial) -> Iterator[str]:
    ask = find_ability(trial.recipe, "known_faults")
    outcome = folder.outcome()
    if ask is None or outcome is None:
        return
    result = folder.result(outcome["attempt"])
    if result is not None and "facts" in result:
        yield from ask(trial.config, result["facts"])


def _rows(trial: TrialRecord, attempt: int) -> Iterator[Mapping[str, Any]]:
    for name in ("trace.jsonl", "evals.jsonl"):
        yield from read_rows(trial.attempt_folder(attempt) / name)


def _measured(row: Mapping[str, Any]) -> str:
    """What must repeat itself, to the last bit."""
    return dumps({key: row[key] for key in sorted(row) if key not in CLOCKED})


def _first_difference(one: str, other: str) -> str:
    a, b = json.loads(one), json.loads(other)
    name = next(key for key in sorted({*a, *b}) if a.get(key) != b.get(key))
    return f"{name} is {a.get(name)!r} and {b.get(name)!r}"


def compare_reports(
    one: tuple[Study, StudyRecord], other: tuple[Study, StudyRecord]
) -> list[Violation]:
    """Write the reports of two studies aside, and compare all but their cost sections."""
    from ablate.report.report import write_report

    with tempfile.TemporaryDirectory(prefix="ablate-verify-") as aside:
        folders = Path(aside, "one"), Path(aside, "other")
        written = [
            write_report(study, record, folder=folder)
            for (study, record), folder in zip((one, other), folders, strict=True)
        ]
        if written[0].digest == written[1].digest:
            return []
        differing = [
            name
            for name in _CORE
            if (folders[0] / name).read_bytes() != (folders[1] / name).read_bytes()
        ]
    return [
        Violation(
            "same_report",
            str(one[1].folder),
            f"its report differs from {other[1].folder}'s in {', '.join(differing) or 'the pages'}",
        )
    ]


def find_remains(folder: Path) -> list[Violation]:
    """Half-written files of a study that nobody works on, and processes of it on this machine.

    A process belongs to a study when it holds a file of its trials open: every rank and whatever
    it starts writes into its attempt's log. Processes of other users are not seen.
    """
    found = [
        Violation("no_remains", str(path), "a half-written file was left behind")
        for path in leftovers(folder)
    ]
    trials = str((folder / "trials").resolve()) + "/"
    for process in psutil.process_iter():
        if any(name.startswith(trials) for name in _open_files(process)):
            words = " ".join(process.cmdline()[:4]) if process.is_running() else ""
            found.append(
                Violation("no_remains", str(folder), f"process {process.pid} lives: {words}")
            )
    return found


def _open_files(process: psutil.Process) -> Iterable[str]:
    try:
        return [file.path for file in process.open_files()]
    except psutil.Error:
        return ()
