"""What all verbs share: the two consoles, options, signals."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ablate.records.folder import StudyRecord


class ClusterKind(StrEnum):
    """What places and starts the trials."""

    RAY = "ray"
    LOCAL = "local"
    DEBUG = "debug"
    """One rank, in this very process."""


out = Console(highlight=False)


err = Console(stderr=True, highlight=False)

StudyArg = Annotated[Path, typer.Argument(help="Study file (YAML).", metavar="STUDY.yaml")]


RunArg = Annotated[Path, typer.Argument(help="Study folder, e.g. runs/quickstart.", metavar="RUN")]


RunsOption = Annotated[
    Path, typer.Option("--runs", file_okay=False, help="Folder of all study folders.")
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow store; a file beside the study folders if left out.",
    ),
]


StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="ABLATE_STORAGE",
        help="Optuna storage URL, e.g. postgresql://user@host/name; a file of the study if left "
        "out.",
    ),
]


AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster to use, e.g. auto; a private one if left out.")
]


ClusterOption = Annotated[
    ClusterKind, typer.Option(help="ray, or local: plain processes of this machine.")
]


CpusOption = Annotated[
    float | None, typer.Option(help="Cores to use of this machine; all if left out.")
]


def say_behind(record: StudyRecord) -> Callable[[str], None]:
    """What is said when MLflow or Optuna's storage is not complete at the end."""
    return lambda trouble: err.print(
        f"note: {trouble}. Nothing is lost; bring it up to date with "
        f"`ablate rebuild {record.folder}`.",
        style="yellow",
        markup=False,
        soft_wrap=True,
    )


def called(run: Path, trials: Iterable[str]) -> dict[str, str]:
    """Trial id -> its levels, seed and id, for people; `run` is a study's or a trial's folder.

    Just the id where the study cannot be read.
    """
    from ablate.api import open_run
    from ablate.errors import AblateError

    study = run.resolve().parents[1] if (run / "trial.json").exists() else run
    try:
        names = open_run(study).names()
    except AblateError:
        names = {}
    return {key: f"{names[key]} ({key})" if key in names else key for key in trials}


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Count Ctrl-C and SIGTERM instead of dying; gives the function that tells the count.

    A terminal that hangs up (SIGHUP, from the shell and from the system) counts as one Ctrl-C, and
    what was to be shown there goes nowhere. `nohup` keeps its meaning.
    """
    count = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal count
        if number == signal.SIGHUP:
            _leave_terminal()
            count = max(count, 1)
            return
        count += 1
        if count == 1:
            text = "stopping: trials write a checkpoint first; again to end them at once"
        else:
            text = "ending at once"
        os.write(2, f"\n{text}\n".encode())

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: min(count, 2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Let nothing fail for a terminal that is gone: writing to it is an error from now on."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        if os.isatty(stream) or not _is_open(stream):
            os.dup2(nowhere, stream)
    os.close(nowhere)


def _is_open(stream: int) -> bool:
    try:
        os.fstat(stream)
        if stream:
            os.write(stream, b"")
    except OSError:
        return False
    return True


_SPELT = {
    "\u2192": "->",
    "\u00d7": "x",
    "\u2013": "-",
    "\u2212": "-",
    "\u2026": "...",
    "\u00b7": "-",
}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that the output cannot take."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    given = error.object[error.start : error.end]
    return "".join(_SPELT.get(character, "?") for character in given), error.end


def visible(text: str) -> str:
    """The text with characters that a terminal would obey, as of a file's name, spelt out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


def take_any_text() -> None:
    """Let output that is not UTF-8 (old locales, batch systems) cost characters, no answer."""
    codecs.register_error("ablate-spell", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ablate-spell")


def print_json_text(text: str) -> None:
    """JSON as it is, with escapes where the output cannot take its characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=1) + "\n"
    sys.stdout.write(text)


def print_json(value: Any) -> None:
    from ablate.records.files import dumps

    print_json_text(dumps(value, indent=1) + "\n")
