"""The verb that looks on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ablate.api import RUNS, Run, open_run
from ablate.cli.terminal import out
from ablate.errors import RecordError

app = typer.Typer()


@app.command()
def watch(
    run: Annotated[
        Path | None,
        typer.Argument(help="Study folder, or a trial's; the newest study if left out."),
    ] = None,
    trial: Annotated[
        str | None,
        typer.Argument(help="One trial: its id, or its name such as 'beta2=0.98 · seed 0'."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
) -> None:
    """Watch a study as it goes: table, curves, marker events.

    It only looks: Ctrl-C ends the watching, not the study. It ends by itself when nobody runs the
    study any more.
    """
    from ablate.cli.screen import follow

    folder = run or _newest(RUNS)
    if (folder / "trial.json").exists():
        folder, trial = folder.resolve().parents[1], folder.resolve().name
    opened = open_run(folder)
    chosen = _find(opened, trial) if trial is not None else None
    try:
        follow(opened, chosen, once=once, console=out)
    except KeyboardInterrupt:
        return


def _newest(runs: Path) -> Path:
    """The study that was worked on last.

    Raises:
        RecordError: there is none.
    """
    found = [path.parent for path in runs.glob("*/study.json")]
    if not found:
        raise RecordError(f"{runs} holds no study yet. Make one: ablate launch STUDY.yaml")
    return max(found, key=_touched)


def _touched(study: Path) -> float:
    names = ("controller.beat", "study.json")
    return max((study / n).stat().st_mtime for n in names if (study / n).exists())


def _find(opened: Run, asked: str) -> str:
    """The id of the trial that is meant by an id, its beginning, or a name.

    Raises:
        RecordError: none, or several; names those that are near.
    """
    names = opened.names()
    exact = [key for key, name in names.items() if asked in (key, name)]
    near = [key for key, name in names.items() if key.startswith(asked) or asked in name]
    found = exact or near
    if len(found) == 1:
        return found[0]
    which = [f"{names[key]} ({key})" for key in (found or names)][:12]
    many = "several trials" if found else "no trial"
    raise RecordError(f"{asked!r} names {many} of {opened.folder}. There are: {'; '.join(which)}")
