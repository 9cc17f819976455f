"""The best setting of a study, ready to be used elsewhere: ``best/``.

::

    best/config.yaml        the resolved configuration, as a study's baseline
         train.sh           the peer's command line with every value, and where it comes from
         model/             weights and architecture, as the peer loads them
         architecture/      the architecture alone, to train it from scratch
         provenance.json    study, trial, result, rivals, versions, checksums

The best cell is the one with the best mean over complete seed blocks, a diverged run counting as
chance; never the one with the single best run. Its model is the run of the median seed, a typical
run of that setting: the best of several seeds is luck that the next training will not repeat.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ablate import __version__, recipes, records
from ablate.analysis.best import Choice, choose, choose_cell, with_seed
from ablate.analysis.table import TrialRow, read_table
from ablate.errors import CheckpointError
from ablate.masking import masked_url
from ablate.records import StudyRecord
from ablate.study import Study
from ablate.versions import fingerprint


@dataclass(frozen=True, slots=True)
class ExportPaths:
    """What was written."""

    folder: Path
    config: Path
    script: Path | None
    """None when the peer cannot train this configuration; a warning says why."""
    model: Path | None
    """None when the trial's last checkpoint is not here; a warning says so."""
    provenance: Path
    sentence: str
    """Which cell, why, and how sure that is."""
    warnings: tuple[str, ...]


def export_best(
    study: Study,
    record: StudyRecord,
    *,
    folder: Path | None = None,
    cell: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> ExportPaths:
    """Write the best cell's configuration, command and model into `folder` (``best``).

    `cell` and `seed` choose another one; levels that are not named stand at the baseline.

    Raises:
        AnalysisError: no cell has a completed run, or there is no such cell.
    """
    table = read_table(study, record, curves=False)
    choice = choose(table) if cell is None else choose_cell(table, cell)
    if seed is not None:
        choice = with_seed(choice, seed)
    folder = folder or record.folder / "best"
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        written = _write(study, record, choice, temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    script, model, warnings = written
    return ExportPaths(
        folder=folder,
        config=folder / "config.yaml",
        script=folder / "train.sh" if script else None,
        model=folder / "model" if model else None,
        provenance=folder / "provenance.json",
        sentence=choice.sentence,
        warnings=(*choice.warnings, *warnings),
    )


# --------------------------------------------------------------------------- files


def _write(
    study: Study, record: StudyRecord, choice: Choice, folder: Path
) -> tuple[bool, bool, list[str]]:
    """Fill `folder`; (whether there is a script, whether there is a model, warnings)."""
    row = choice.trial
    recipe = recipes.load(study.recipe)
    config = recipe.Config(**(row.config or {}))
    workers = study.gang.workers
    warnings: list[str] = []

    model, checkpoint, problem = _export_model(
        recipe, config, record, row, folder, copies=study.checkpoints_of(row.id)
    )
    if problem:
        warnings.append(problem)
    command: list[str] = []
    try:
        command = recipe.command(config, workers=workers)
    except ValueError as error:
        warnings.append(f"no train.sh: {error}")
    if command:
        command = _with_architecture(command, folder)
        script = folder / "train.sh"
        script.write_text(shell_script(command, _origin(study, choice), root=study.root))
        script.chmod(0o700)

    (folder / "config.yaml").write_text(_config_yaml(study, choice), encoding="utf-8")
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {
        "format": 1,
        "study": study.name,
        "study_file_sha256": hashlib.sha256(study.text.encode()).hexdigest(),
        "trial": row.id,
        "seed": row.seed,
        "levels": dict(row.levels),
        "objective": study.objective.model_dump(),
        "result": {"value": row.value, "step": row.step, "verdict": row.verdict},
        "cell": {
            "name": choice.cell.name,
            "score": choice.score,
            "seeds": list(choice.seeds),
            "runs": {str(r.seed): r.value if r.value is not None else r.state
                     for r in choice.cell.trials},
        },
        "compared_cells": choice.compared,
        "not_told_apart": list(choice.rivals),
        "why": choice.sentence,
        "warnings": [*choice.warnings, *warnings],
        "checkpoint": checkpoint,
        "command": command,
        "config": dict(row.config or {}),
        "workers": workers,
        "trained_with": dict(row.fingerprint or {}),
        "exported_with": {"ablate": __version__, **fingerprint()},
        "files": files,
    }  # fmt: skip
    (folder / "provenance.json").write_text(records.dumps(content, indent=1) + "\n")
    return bool(command), model, warnings


def _export_model(
    recipe: recipes.Recipe,
    config: Any,
    record: StudyRecord,
    row: TrialRow,
    folder: Path,
    *,
    copies: str | None,
) -> tuple[bool, dict[str, Any] | None, str]:
    """Write model/ and architecture/; (done, checkpoint, what stood in the way).

    A checkpoint that is not on disk is brought there from `copies`, its place in an object store.
    """
    home = record.record(row.id).folder / "checkpoints"
    path = home / f"step-{row.step:06d}"
    if not path.is_dir() and copies is not None and row.step:
        problem = _fetch(copies, row.step, home)
        if problem:
            return False, None, f"no model: {path} is not here, and {copies}: {problem}"
    if not path.is_dir():
        return False, None, f"no model: {path} is not here"
    manifest = records.read_json(path / "manifest.json")
    weights = path / "model.safetensors"
    with open(weights, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    if checksum != manifest["files"][weights.name]["sha256"]:
        raise CheckpointError(
            f"{weights} does not match its checksum: it was damaged after training. "
            "Export another seed (--seed), or launch the trial again from an empty folder."
        )
    try:
        recipe.export_model(config, weights, folder / "model")
    except ValueError as error:
        shutil.rmtree(folder / "model", ignore_errors=True)
        return False, None, f"no model: {error}"
    architecture = folder / "model" / "open_clip_config.json"
    if architecture.is_file():
        (folder / "architecture").mkdir()
        shutil.copyfile(architecture, folder / "architecture" / architecture.name)
    return True, {"step": row.step, "sha256": checksum}, ""


def _fetch(url: str, step: int, home: Path) -> str | None:
    """Bring a checkpoint from an object store into `home`; what stood in the way, if anything."""
    from ablate.training.remote import Remote  # imports torch

    try:
        remote = Remote(url)
        if step not in remote.steps():
            return f"there is no checkpoint of step {step}"
        return remote.get(step, home)
    except Exception as error:  # every store has exceptions of its own
        return f"{type(error).__name__}: {masked_url(str(error))}"


def _with_architecture(command: Sequence[str], folder: Path) -> list[str]:
    """`command`, naming the exported architecture where the peer has none of that name."""
    command = list(command)
    if "--model" not in command or not (folder / "architecture").is_dir():
        return command
    place = command.index("--model") + 1
    found = importlib.util.find_spec("open_clip")  # without importing it, and torch with it
    if found is None or found.origin is None:
        return command
    known = Path(found.origin).parent / "model_configs" / f"{command[place]}.json"
    if not known.is_file():
        command[place] = "local-dir:architecture"
    return command


def shell_script(command: Sequence[str], comments: Sequence[str], *, root: str) -> str:
    """A bash script that runs `command` with relative data paths under `root`.

    Every word is quoted; comments are kept to their lines.
    """
    lines = ["#!/usr/bin/env bash"]
    lines += [f"# {_one_line(comment)}".rstrip() for comment in comments]
    groups: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--") and word != "--" and len(groups[-1]) > 0:
            groups.append([])
        groups[-1].append(word)
    if "local-dir:architecture" in command:
        lines += [
            "",
            'here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)',
        ]
    lines += [
        "",
        "set -euo pipefail",
        "# Shards are data: webdataset runs no pipe and unpickles nothing.",
        "export WDS_SECURE=1",
        "# Relative data paths are relative to this folder; DATA_ROOT moves it.",
        f"root={shlex.quote(root)}",
        'cd -- "${DATA_ROOT:-$root}"',
        "",
    ]
    words = [" ".join(_quote(word) for word in group) for group in groups]
    lines.append(" \\\n  ".join(["exec " + words[0], *words[1:]]))
    return "\n".join(lines) + "\n"


def _quote(word: str) -> str:
    if word == "local-dir:architecture":
        return '"local-dir:$here/architecture"'
    return shlex.quote(word)


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f\u0085\u2028\u2029]+", " ", text)


def _origin(study: Study, choice: Choice) -> list[str]:
    """Where a file of the export comes from, a line each."""
    row = choice.trial
    versions = row.fingerprint or {}
    listed = ", ".join(f"{name} {value}" for name, value in _flat(versions))
    return [
        choice.sentence,
        f"Study {study.name}, trial {row.id}: {choice.cell.name}, seed {row.seed} (the median seed "
        f"unless asked otherwise), {study.objective.metric} {row.value} at step {row.step}.",
        f"Trained with {listed}." if listed else "The versions it was trained with are not known.",
        f"Written by ablate {__version__}.",
    ]


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", str(value)))
    return found


def _config_yaml(study: Study, choice: Choice) -> str:
    """A study's beginning: add factors, and it is compared with."""
    config = {k: v for k, v in (choice.trial.config or {}).items() if k != "seed"}
    content = {
        "recipe": study.recipe,
        "baseline": json.loads(json.dumps(config)),
        "seeds": list(study.seeds),
        "objective": study.objective.model_dump(),
        "gang": study.gang.model_dump(),
    }
    comments = [
        *_origin(study, choice),
        "Every value is resolved. Add factors to ask what to change next.",
    ]
    head = "".join(f"# {_one_line(line)}\n" for line in comments)
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
