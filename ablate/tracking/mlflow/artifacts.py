"""The files that a trial's and a study's run show."""

from __future__ import annotations

import contextlib
import gzip
import shlex
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ablate.records.files import dumps, loads
from ablate.records.folder import TrialRecord
from ablate.records.masking import masked, masked_url
from ablate.report.replay import draw_record
from ablate.tracking.mlflow.rows import write_rows
from ablate.trial.identity import Outcome, Trial
from ablate.trial.recipe import ability, load

STUDY_FILES = (
    "report.html",
    "report.md",
    "verdicts.json",
    "timeline.png",
    "best/config.yaml",
    "best/train.sh",
)
"""Files of a study folder that its run shows, when they exist, beside the report's figures."""

_LARGEST_PLAIN_TRACE = 2**20
"""Bytes; a longer trace is stored compressed."""

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, where it is built


def write_artifacts(
    folder: Path,
    trial: Trial,
    record: TrialRecord,
    outcome: Mapping[str, Any],
    *,
    trace: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    title: str,
    verdict: str,
) -> None:
    """Write a trial's configuration, command, logs and picture into `folder`, secrets masked."""
    content = masked("", record.trial())
    config = content["config"]
    (folder / "trial.json").write_text(dumps(content, indent=1) + "\n")
    (folder / "outcome.json").write_text(dumps(masked("", outcome), indent=1) + "\n")
    (folder / "config.yaml").write_text(_yaml_of(config))
    if line := _line_of(trial, config):
        (folder / "command.txt").write_text(line)
    learned = record.learned()
    if learned is not None:
        (folder / "learning.json").write_text(dumps(learned, indent=1) + "\n")
    for picture in sorted((record.folder / "pictures").glob("*.png")):
        shutil.copyfile(picture, folder / picture.name)
    write_rows(folder / "events.jsonl", events)
    write_rows(folder / "evals.jsonl", record.evaluations())
    _write_trace(folder / "trace.jsonl", trace)
    if events:  # the page itself draws curves; what the markers saw it cannot
        draw_record(folder / "timeline.png", record, title=title, verdict=verdict)
    attempts = record.attempts()
    if outcome["outcome"] != Outcome.COMPLETED and attempts:
        tail = record.log_tail(attempts[-1], lines=200)
        if tail:
            (folder / "log.txt").write_text(masked_url(tail) + "\n")


def _yaml_of(config: Mapping[str, Any]) -> str:
    """A configuration as YAML, its seed last: the rest is the same for all seeds of a cell."""
    rest = {name: value for name, value in config.items() if name != "seed"}
    if not rest or "seed" not in config:
        return _dump_once(dumps(config))
    return _dump_once(dumps(rest)) + str(yaml.dump({"seed": config["seed"]}, Dumper=_Dumper))


@lru_cache(maxsize=16)  # of the cells whose trials end about now
def _dump_once(config: str) -> str:
    return str(yaml.dump(loads(config), Dumper=_Dumper, sort_keys=False))


def command_of(trial: Trial) -> str:
    """The trial's own line, secrets masked; empty where its setting or recipe has none."""
    return _line_of(trial, masked("", trial.config))


def _line_of(trial: Trial, config: Mapping[str, Any]) -> str:
    with contextlib.suppress(ValueError):
        line = ability(trial.recipe, "command")(
            load(trial.recipe).Config(**config), workers=int(trial.gang.get("workers", 1))
        )
        return shlex.join(line) + "\n"
    return ""


def _write_trace(path: Path, trace: Sequence[Mapping[str, Any]]) -> None:
    write_rows(path, trace)
    if path.stat().st_size > _LARGEST_PLAIN_TRACE:
        with open(path, "rb") as plain, gzip.open(f"{path}.gz", "wb", 5) as file:
            shutil.copyfileobj(plain, file)
        path.unlink()
