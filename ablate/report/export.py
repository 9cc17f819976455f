"""The best setting of a study, ready to be used elsewhere: ``best/``.

::

    best/config.yaml        the setting, as a study's baseline; config.full.yaml: every value
         run.sh             our own trainer: the trial again, the same numbers
         train.sh           the upstream trainer's line, to its number; requirements.txt
         slurm.sh sky.yaml  either of them elsewhere
         model/             weights, architecture, model card, as upstream loads them
         provenance.json    study, trial, result, rivals, versions, checksums

Which setting that is, and why, is decided by :mod:`ablate.report.best`: combine and confirm, never
the best mean for its own sake. Its model is the run of the median seed, a typical run of that
setting: the best of several seeds is luck that the next training will not repeat.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate import __version__
from ablate.analysis.course import best_of
from ablate.errors import AnalysisError, CheckpointError
from ablate.records.files import dumps, read_json
from ablate.records.folder import StudyRecord
from ablate.records.masking import masked_url
from ablate.records.provenance import fingerprint, installed
from ablate.report.best import Recommendation, as_asked, recommend, with_seed
from ablate.report.bundle import (
    Setting,
    config_yaml,
    find_licences,
    leave_defaults_out,
    model_card,
    readme,
    requirements,
    run_script,
    sky_yaml,
    slurm_script,
)
from ablate.report.script import command_script, train_script, write_script
from ablate.study import Study
from ablate.study.table import TrialRow, read_table
from ablate.trial.recipe import Role, ability, fields_of, find_ability, load

if TYPE_CHECKING:
    from ablate.trial.upstream import Upstream


FIRST_STEPS = 32
"""Steps whose losses go with an export, to compare another run with."""


@dataclass(frozen=True, slots=True)
class ExportPaths:
    """What was written."""

    folder: Path
    config: Path
    run: Path
    """Our own trainer, once more."""
    script: Path | None
    """None when the peer cannot train this configuration; a warning says why."""
    model: Path | None
    """None when the trial's last checkpoint is not here; a warning says so."""
    provenance: Path
    sentence: str
    """Which cell, why, and how sure that is."""
    warnings: tuple[str, ...]

    def files(self) -> list[tuple[str, Path]]:
        """What there is, with a word for each."""
        places = {
            "config": self.config, "run": self.run, "upstream": self.script, "model": self.model,
            "source": self.provenance,
        }  # fmt: skip
        return [(name, path) for name, path in places.items() if path is not None]

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            **{name: str(path) for name, path in self.files()},
            "sentence": self.sentence,
            "warnings": list(self.warnings),
        }


def parse_cell(words: Sequence[str]) -> dict[str, str]:
    """Levels of ``FACTOR=LEVEL`` words; ``baseline`` alone names none.

    Raises:
        AnalysisError: a word is something else.
    """
    levels = {}
    for word in (part.strip() for given in words for part in given.split(",")):
        name, equals, level = word.partition("=")
        if word == "baseline":
            continue
        if not (name and equals and level):
            raise AnalysisError(f"{word!r} names no level; write FACTOR=LEVEL, e.g. beta2=0.98")
        levels[name] = level
    return levels


def export_best(
    study: Study,
    record: StudyRecord,
    *,
    folder: Path | None = None,
    cell: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> ExportPaths:
    """Write the configuration, command and model of what the study recommends into `folder`
    (``best``).

    `cell` and `seed` choose another one; levels that are not named stand at the baseline.

    Raises:
        AnalysisError: nothing is handed out, with the reason, or there is no such cell.
    """
    table = read_table(study, record, curves=False)
    choice = recommend(table) if cell is None else as_asked(table, cell)
    if seed is not None:
        choice = with_seed(choice, seed)
    _ = choice.run  # before anything is written: there may be nothing to hand out
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
        run=folder / "run.sh",
        script=folder / "train.sh" if script else None,
        model=folder / "model" if model else None,
        provenance=folder / "provenance.json",
        sentence=choice.sentence,
        warnings=(*_notes(choice), *warnings),
    )


# --------------------------------------------------------------------------- files


def _write(
    study: Study, record: StudyRecord, choice: Recommendation, folder: Path
) -> tuple[bool, bool, list[str]]:
    """Fill `folder`; (whether there is train.sh, whether there is a model, warnings)."""
    setting = _setting(study, record, choice)
    config = load(study.recipe).Config(**setting.full)
    warnings: list[str] = []
    upstream: Upstream | None = None
    command: list[str] = []
    try:
        if find_ability(study.recipe, "upstream") is not None:
            upstream = _write_upstream(setting, config, folder)
            command = upstream.command(workers=study.gang.workers)
        else:
            command = _write_command(setting, config, folder)
    except ValueError as error:
        warnings.append(f"no train.sh: {error}")
    write_script(folder / "run.sh", run_script(setting))
    write_script(folder / "slurm.sh", slurm_script(setting, upstream=upstream is not None))
    texts = {
        "config.yaml": config_yaml(setting, full=False),
        "config.full.yaml": config_yaml(setting, full=True),
        "sky.yaml": sky_yaml(setting, upstream=upstream is not None),
        "requirements.txt": _requirements(upstream),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    model, checkpoint, problem = _export_model(
        study.recipe,
        config,
        record,
        choice.run,
        folder,
        step=_counted_step(study, record, choice.run),
        copies=study.checkpoints_of(choice.run.id),
    )
    if problem:
        warnings.append(problem)
    if model:
        _write_card(setting, upstream, folder / "model", warnings)
    last = "provenance.json"
    made = {n: what for n, what in _FILES.items() if (folder / n).exists() or n == last}
    (folder / "README.md").write_text(readme(setting, made), encoding="utf-8")
    content = _provenance(setting, upstream, command, checkpoint, warnings, folder)
    (folder / "provenance.json").write_text(dumps(content, indent=1) + "\n")
    return bool(command), model, warnings


_FILES = {
    "config.yaml": "the setting, a study's beginning: add factors to go on from it",
    "config.full.yaml": "the same with every value resolved",
    "run.sh": "trains it again as the study did, the same numbers to the last bit",
    "train.sh": "trains it without us, by the upstream trainer or as the command that it is",
    "requirements.txt": "versions with which it was seen to run",
    "slurm.sh": "either of them under Slurm",
    "sky.yaml": "on a rented machine",
    "model": "weights, architecture and model card, as upstream loads them",
    "provenance.json": "study, trial, results of all seeds, versions, checksums",
}
"""What each file of a bundle is for."""


def _setting(study: Study, record: StudyRecord, choice: Recommendation) -> Setting:
    trial = record.record(choice.run.id)
    full = dict(choice.run.config or {})
    return Setting(
        study=study,
        choice=choice,
        full=full,
        minimal=leave_defaults_out(load(study.recipe).Config, full),
        result=trial.result(max(trial.attempts(), default=0)) or {},
        losses=[row["loss"] for row in trial.trace()[:FIRST_STEPS] if "loss" in row],
    )


def _write_upstream(setting: Setting, config: Any, folder: Path) -> Upstream:
    """train.sh and what it needs to run.

    Raises:
        ValueError: upstream cannot do the same.
    """
    study, row = setting.study, setting.choice.run
    upstream: Upstream = ability(study.recipe, "upstream")(
        config,
        workers=study.gang.workers,
        root=Path(study.root),
        steps=row.step or None,
        faults=(setting.result.get("facts") or {}).get("shard_faults"),
    )
    comments = [
        *setting.origin(),
        "",
        f"Trains this setting with {upstream.name}, and prints {setting.metric}. It draws its own "
        f"order of the data: expect {setting.band()}",
        *upstream.notes,
        "",
        "DATA_ROOT is where relative data paths begin, LOGS the folder of its logs, NAME the name "
        "of the run within it; --dry-run prints the line.",
    ]
    text = train_script(
        upstream,
        comments,
        root=study.root,
        workers=study.gang.workers,
        name=f"{study.name}-{row.id}",
        metric=setting.metric,
    )
    write_script(folder / "train.sh", text)
    for name, content in upstream.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return upstream


def _write_command(setting: Setting, config: Any, folder: Path) -> list[str]:
    """train.sh of a recipe whose trials are a command line themselves.

    Raises:
        ValueError: the recipe has none.
    """
    study = setting.study
    words: list[str] = ability(study.recipe, "command")(config, workers=study.gang.workers)
    comments = [
        *setting.origin(),
        "",
        f"The line of the trial itself. Where it repeats itself it gives {setting.metric} "
        f"{setting.choice.run.value}, else expect {setting.band()}",
    ]
    write_script(folder / "train.sh", command_script(words, comments, root=study.root))
    return words


def _requirements(upstream: Upstream | None) -> str:
    if upstream is None:
        return requirements({"ablate-runner": __version__}, what="What run.sh needs.")
    versions = {name: installed(name) for name in upstream.requirements}
    what = f"What {upstream.name} was seen to run with; run.sh needs ablate-runner {__version__}."
    return requirements(versions, what=what)


def _write_card(
    setting: Setting, upstream: Upstream | None, folder: Path, warnings: Sequence[str]
) -> None:
    names = sorted(fields_of(load(setting.study.recipe).Config, Role.PATH))
    paths = [str(setting.full[name]) for name in names if setting.full.get(name) is not None]
    card = model_card(
        setting,
        library=upstream.library if upstream else "",
        data=find_licences(Path(setting.study.root), paths),
        limits=[*_notes(setting.choice), *warnings],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _provenance(
    setting: Setting,
    upstream: Upstream | None,
    command: Sequence[str],
    checkpoint: Mapping[str, Any] | None,
    warnings: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """provenance.json, with a checksum of every other file."""
    study, choice, row = setting.study, setting.choice, setting.choice.run
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {
        "format": 2,
        "study": study.name,
        "recipe": study.recipe,
        "root": study.root,
        "study_file_sha256": hashlib.sha256(study.source.text.encode()).hexdigest(),
        "trial": row.id,
        "seed": row.seed,
        "levels": dict(row.levels),
        "objective": study.objective.model_dump(),
        "result": {"value": row.value, "step": row.step, "verdict": row.verdict},
        "cell": {
            "name": choice.chosen.name,
            "score": choice.score,
            "seeds": list(choice.seeds),
            "runs": {str(r.seed): r.value if r.value is not None else r.state
                     for r in choice.chosen.trials},
        },
        "compared_cells": choice.compared,
        "not_told_apart": list(choice.rivals),
        "chosen_as": choice.kind,
        "why": choice.why,
        "evidence": asdict(choice.evidence) if choice.evidence else None,
        "to_know_more": choice.to_know_more,
        "known_against": list(choice.known_against),
        "warnings": [*choice.warnings, *warnings],
        "checkpoint": checkpoint,
        "command": list(command),
        "parser": upstream.parser if upstream else "",
        "config": dict(setting.full),
        "workers": study.gang.workers,
        "first_losses": list(setting.losses),
        "final": {setting.metric: row.value, **(setting.result.get("final") or {})},
        "facts": dict(setting.result.get("facts") or {}),
        "trained_with": dict(row.fingerprint or {}),
        "exported_with": {"ablate": __version__, **fingerprint()},
        "files": files,
    }  # fmt: skip


def _notes(choice: Recommendation) -> list[str]:
    return [*(f"known against it: {why}" for why in choice.known_against), *choice.warnings]


def _counted_step(study: Study, record: StudyRecord, row: TrialRow) -> int:
    """The step whose weights a run counts with; the last, where it counts with a mean."""
    goal = study.objective
    if goal.at != "best_by_heldout":
        return row.step
    evaluations = record.record(row.id).evaluations()
    best = best_of(evaluations, metric=goal.metric, heldout=goal.heldout, sign=goal.sign)
    return row.step if best is None else int(best["step"])


def _export_model(
    recipe: str,
    config: Any,
    record: StudyRecord,
    row: TrialRow,
    folder: Path,
    *,
    step: int,
    copies: str | None,
) -> tuple[bool, dict[str, Any] | None, str]:
    """Write model/; (done, checkpoint, what stood in the way).

    A checkpoint that is not on disk is brought there from `copies`, its place in an object store.
    """
    home = record.record(row.id).folder / "checkpoints"
    path = home / f"step-{step:06d}"
    if find_ability(recipe, "export_model") is None:
        is_kept = home.is_dir() and any(home.iterdir())
        kept = f"; what the program kept is in {home}" if is_kept else ""
        return False, None, f"no model: recipe {recipe} exports none{kept}"
    if not path.is_dir() and copies is not None and step:
        problem = _fetch(copies, step, home)
        if problem:
            return False, None, f"no model: {path} is not here, and {copies}: {problem}"
    if not path.is_dir():
        return False, None, f"no model: {path} is not here"
    manifest = read_json(path / "manifest.json")
    weights = path / "model.safetensors"
    with open(weights, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    if checksum != manifest["files"][weights.name]["sha256"]:
        raise CheckpointError(
            f"{weights} does not match its checksum: it was damaged after training. "
            "Export another seed (--seed), or launch the trial again from an empty folder."
        )
    try:
        ability(recipe, "export_model")(config, weights, folder / "model")
    except ValueError as error:
        shutil.rmtree(folder / "model", ignore_errors=True)
        return False, None, f"no model: {error}"
    return True, {"step": step, "sha256": checksum}, ""


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
