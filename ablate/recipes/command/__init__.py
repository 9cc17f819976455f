"""Any program as a trial: a command with placeholders, and the measurements that it prints.

::

    recipe: command
    baseline:
      command: python train.py --lr {lr} --seed {seed}
      metrics: {accuracy: maximize}
      lr: 0.1
    factors: {lr: [0.1, 0.01]}

A line of JSON on standard output, or in the file that ABLATE_METRICS names, is a row:
``{"step": 10, "loss": 2.3}`` of a step, ``{"eval": true, "accuracy": 0.4}`` of an evaluation, which
any line with a declared metric is. Lines of other shapes are read by ``patterns``, a file of rows
by ``table``. Steps rise. ``train_loss``, ``learning_rate`` and the like are recorded as ``loss``
and ``lr``, by which markers judge. A run ends with exit status 0 and the objective measured; one
whose objective is not finite has diverged. SIGTERM is handed on: a command with {checkpoints}
writes one and goes on from it, any other starts again, and resumed.json says so.

With several workers each rank runs the command, told apart by RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT as under torchrun; rank 0's lines are the trial's.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from ablate.recipes.command.beginning import beginning
from ablate.recipes.command.fields import PLACEHOLDER, Config, Measured
from ablate.recipes.command.run import run
from ablate.trial.metrics import Metric
from ablate.trial.recipe import Outline

PRELOAD = ("ablate.trial.worker", "ablate.recipes.command", "ablate.markers")

_PYTHONS = ("python", "python3")

__all__ = [
    "PRELOAD",
    "Config",
    "Measured",
    "beginning",
    "command",
    "metrics",
    "outline",
    "reads",
    "run",
]


def metrics(config: Config) -> tuple[Metric, ...]:
    """What the command is said to measure."""
    return tuple(
        Metric(name, spec.unit, "as the command says", spec.direction, spec.chance)
        for name, spec in config.metrics.items()
    )


def outline(config: Config, *, workers: int, gpus: int, root: Path, deep: bool = False) -> Outline:
    """What is known of a command before it runs: its measurements, and its steps if it says so."""
    warnings = []
    program = config.line(checkpoints="{checkpoints}", folder="{folder}")[0]
    if "/" not in program and program not in _PYTHONS and shutil.which(program) is None:
        warnings.append(f"{program} is not on this machine")
    if "seed" not in PLACEHOLDER.findall(config.command + " ".join(config.env.values())):
        warnings.append(
            "the command has no {seed}: unless the script reads ABLATE_SEED, its seeds are repeats "
            "of one run, and their spread says nothing"
        )
    return Outline(
        measures=tuple(config.metrics),
        steps=config.num_steps,
        no_steps="" if config.num_steps else "the baseline does not say how many (steps)",
        warnings=tuple(warnings),
    )


def reads(config: Config) -> Iterator[tuple[str, str]]:
    """The program, where it is named by a path, and the script that an interpreter is given."""
    program, *words = config.line(checkpoints="{checkpoints}", folder="{folder}")
    if "/" in program:
        yield "command", str(Path(config.cwd) / program)
    options = list(takewhile(lambda word: word.startswith("-"), words))
    script = next(iter(words[len(options) :]), "")
    is_text = any(option.endswith("c") for option in options)  # bash -ec 'TEXT'
    if program in (*_PYTHONS, "bash", "sh") and script.endswith((".py", ".sh")) and not is_text:
        yield "command", str(Path(config.cwd) / script)


def command(config: Config, *, workers: int) -> list[str]:
    """The line that runs it outside of here; its checkpoints then lie beside it."""
    line = config.line(checkpoints="checkpoints", folder=".")
    if workers == 1:
        return line
    launcher = ["torchrun", "--standalone", "--nproc_per_node", str(workers)]
    if line[0] in ("python", "python3"):
        return [*launcher, *line[1:]]
    return [*launcher, "--no-python", *line]
