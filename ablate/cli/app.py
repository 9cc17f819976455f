"""The command line: verbs only, each one call into the rooms.

Exit codes: 0 done; 1 the study ended, but some trials failed or are missing; 2 wrong usage, a
wrong study file or a wrong folder; 3 the cluster cannot run it, or the disk is full; 130 stopped by
Ctrl-C or `ablate stop` (launch again to go on).
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import sys
from typing import Annotated, NoReturn

import typer

from ablate.cli import ask, judge, machine, read, run, watch
from ablate.cli.examples import show_examples
from ablate.cli.terminal import err, out, take_any_text, visible
from ablate.errors import AblateError, ClusterError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Ablation studies of training settings: which one matters, by how much, how sure.",
    epilog=(
        "Exit codes: 0 done; 1 ended with failed or missing trials; 2 wrong usage or study file; "
        "3 the cluster cannot run it, or the disk is full; 130 stopped, launch again to go on."
    ),
)
for verbs in (ask, run, watch, read, judge, machine):
    app.add_typer(verbs.app)
show_examples(app)


def _say_version(asked: bool) -> None:
    if asked:
        from ablate import __version__

        out.print(f"ablate {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Ablation studies of training settings: which one matters, by how much, how sure."""


def main() -> None:
    """Entry point: run a verb, turn our own errors into a message and an exit code."""
    # Of thousands of modules: looking for garbage is a fifth of their import, and a second at exit.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    os.umask(0o077)  # records, checkpoints and stores are their owner's alone
    take_any_text()
    try:
        app(prog_name="ablate")
    except ClusterError as error:
        _leave(3, str(error))
    except AblateError as error:
        _leave(2, str(error))
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        _leave(2, f"{error.filename}: {error.strerror}. Check the path and who may use it.")
    except OSError as error:
        from ablate.records.files import is_full

        where = f" for {error.filename}" if error.filename else ""
        if is_full(error):
            _leave(
                3,
                f"no space is left{where}. What was recorded is kept: free some space and call "
                "this again.",
            )
        if error.errno == errno.EROFS:
            _leave(
                3,
                f"{error.filename}: on a read-only file system. It can be read (status, plan, "
                "verify, report); what writes needs it writable, or another folder.",
            )
        if error.errno in _AWAY:
            _leave(
                3,
                f"{error.filename or 'a file'}: its file system does not answer "
                f"({error.strerror}). What was recorded is kept: bring it back and call this "
                "again.",
            )
        if isinstance(error, FileNotFoundError) and _is_nowhere():
            _leave(2, "the folder this was called in is gone; go into one that is there (cd ..)")
        raise


def _is_nowhere() -> bool:
    """Whether the current folder was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


_AWAY = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EHOSTDOWN, errno.ETIMEDOUT)
"""A disk or a network share that went while it was used."""


def _leave(code: int, message: str) -> NoReturn:
    with contextlib.suppress(OSError):  # a terminal that is gone
        err.print(f"error: {visible(message)}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)
