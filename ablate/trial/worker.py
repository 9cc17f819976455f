"""Entry of one rank of a trial: ``python -m ablate.trial TRIAL_FOLDER``.

It reads trial.json and the environment, runs the recipe, and leaves its records in the trial's
folder. ABLATE_TRIAL may name the folder instead of the argument; ABLATE_ATTEMPT the number of the
attempt, else the next free one is taken; ABLATE_CHECKPOINTS a place in an object store
(s3://bucket/prefix) that checkpoints are copied to, and found in; ABLATE_SHARE how many of the
trial's workers each rank stands for. The same entry runs under our clusters, ``torchrun`` and
``srun``, or alone.

Exit status: 0 when result.json is written (completed, diverged, infeasible or a data fault), 73
when it is and the other ranks cannot go on, 75 when it was stopped by SIGTERM after a checkpoint,
74 when the disk is full, anything else is a crash.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ablate.errors import DataError, InfeasibleError, LoadError, SpaceError
from ablate.records.files import read_json, write_json
from ablate.records.folder import TrialRecord
from ablate.trial.identity import EXIT_ALONE, EXIT_NO_SPACE, EXIT_STOPPED, SHARE
from ablate.trial.recipe import Role, ability, absolute, fields_of, judged, load
from ablate.trial.session import RecordingSession, Session, Status

log = logging.getLogger("ablate")


def main(arguments: Sequence[str] = ()) -> int:
    """Run one rank; the exit status. A cluster calls it without arguments, in any process."""
    stop = _StopFlag()
    folder = _trial_folder(arguments)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s rank {os.environ.get('RANK', '0')} %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger().setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    faulthandler.enable()
    try:
        return run(folder, stop)
    except Exception as error:
        if not _is_out_of_space(error):
            _note_error(folder, error)
            raise
        log.exception("no space left")
        return EXIT_NO_SPACE


class _StopFlag:
    """Set by SIGTERM; the recipe asks for it once a step."""

    def __init__(self) -> None:
        self.set = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.set = True

    def __call__(self) -> bool:
        return self.set


def run(folder: Path, stop_asked: Callable[[], bool]) -> int:
    """Run the trial of `folder` as this process's rank; the exit status."""
    with open_session(folder, stop_asked=stop_asked) as session:
        return _run(session)


def _run(session: Session) -> int:
    recipe, root = session.trial["recipe"], Path(session.trial["root"])
    try:
        if session.share > 1:
            share_out = ability(recipe, "share_out")
            session.config = share_out(
                session.config, workers=session.workers, ranks=session.world_size, root=root
            )
        ending = load(recipe).run(session)
    except (DataError, LoadError) as error:
        log.exception("the data cannot be used, or the weights do not fit")
        kind = "data fault" if isinstance(error, DataError) else "weights"
        return _give_up(session, "failed", f"{kind}: {error}")
    except InfeasibleError as error:
        log.exception("it does not fit this machine")
        return _give_up(session, "infeasible", str(error))
    session.conclude(ending)
    if session.first:
        log.info("%s: %s", ending.status, ending.reason)
    return EXIT_STOPPED if ending.status == "stopped" else 0


def _give_up(session: Session, status: Status, reason: str) -> int:
    # Any rank may be the one; the others wait for it in a collective, and the result stands.
    session.give_up(status, reason)
    return EXIT_ALONE if session.world_size > 1 else 0


def open_session(folder: Path, *, stop_asked: Callable[[], bool]) -> Session:
    """The session of this process, from trial.json and its environment.

    Raises:
        SystemExit: the environment does not start as many workers as the trial asks for.
    """
    trial = read_json(folder / "trial.json")
    wanted = int(trial["gang"]["workers"])
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size * int(os.environ.get(SHARE, "1")) != wanted:
        raise SystemExit(
            f"trial.json asks for {wanted} workers, and WORLD_SIZE is {world_size}. Start that "
            f"many, e.g. torchrun --nproc_per_node {wanted} -m ablate.trial {folder}"
        )
    recipe = load(trial["recipe"])
    given = recipe.Config(**trial["config"])
    about: dict[str, Any] = {
        "config": absolute(given, root=Path(trial["root"])),
        "recorded": given.model_dump(mode="json"),
        "may_differ": fields_of(type(given), Role.FREE),
        "world_size": world_size,
        "stop_asked": stop_asked,
    }
    told = os.environ.get("ABLATE_ATTEMPT")
    number = int(told) if told else None
    if rank:
        return Session(trial, folder, rank=rank, attempt=number, **about)
    number = number or max(TrialRecord(folder).attempts(), default=0) + 1
    accuracy = judged(recipe.metrics(given))
    return RecordingSession(trial, folder, attempt=number, accuracy=accuracy, **about)


_OF_THE_MACHINE = re.compile(
    r"cuda|nccl|cudnn|cublas|hip error|gloo|out of memory|connection|timed out|unavailable", re.I
)
"""Words of errors that another try, or another machine, may not meet."""


def _note_error(folder: Path, error: Exception) -> None:
    """Write what the code raised, and where, as error-RANK.json: unless it is one of the machine,
    the same in the next attempt says that a third would end alike."""
    number = os.environ.get("ABLATE_ATTEMPT")
    foreign = type(error).__module__.startswith(("torch", "ray"))
    text = " ".join(str(error).split())[:500]
    if number is None or foreign or isinstance(error, (OSError, MemoryError)):
        return
    frames = traceback.extract_tb(error.__traceback__)
    if _OF_THE_MACHINE.search(text) or not frames:
        return
    last = frames[-1]
    place = f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno} in {last.name}"
    content = {"text": f"{type(error).__name__}: {text}", "place": place}
    with contextlib.suppress(OSError):
        path = folder / "attempts" / number / f"error-{os.environ.get('RANK', '0')}.json"
        write_json(path, content)


def _trial_folder(arguments: Sequence[str]) -> Path:
    given = arguments[0] if arguments else os.environ.get("ABLATE_TRIAL")
    if not given:
        raise SystemExit(
            "which trial? Give its folder: python -m ablate.trial TRIAL_FOLDER "
            "(or set ABLATE_TRIAL)"
        )
    folder = Path(given).resolve()
    if not (folder / "trial.json").is_file():
        raise SystemExit(f"{folder} holds no trial.json; give the folder of a trial")
    return folder


def _is_out_of_space(error: Exception) -> bool:
    # safetensors tells the operating system's error in words alone.
    return isinstance(error, SpaceError) or any(
        os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)
    )
