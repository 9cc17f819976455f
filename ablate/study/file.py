"""A study file: YAML in, a `Study` out, or every problem with its line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ablate.errors import StudyError
from ablate.markers import thresholds as markers
from ablate.records.files import find_json
from ablate.records.names import find_study_fault
from ablate.records.source import Problems
from ablate.records.yaml_text import drop_notes, parse_yaml
from ablate.study.checks import (
    check_controls,
    check_design,
    parse_hypothesis,
    resolve_objective,
)
from ablate.study.levels import find_twins, parse_factors, parse_nuisance, resolve
from ablate.study.schema import DESIGNS, SEEDS, SequentialSeeds, SettingFile, StudyFile
from ablate.study.study import Source, Study
from ablate.trial.recipe import Recipe, load

_MAX_BYTES = 1_000_000
"""Of a study file; those written by hand have a few thousand."""


def load_study(path: Path | str, *, root: Path | str | None = None) -> Study:
    """Read, validate and resolve a study file.

    Relative data paths in it are relative to `root`, by default the current folder.

    Raises:
        StudyError: every problem found, a line each, as ``file:line: what, what is allowed``.
    """
    return parse_study(_read(Path(path)), path=str(path), root=root)


def load_setting(path: Path | str, *, root: Path | str | None = None) -> Study:
    """The setting of a file as an export writes it, or the baseline of a study file, as a study.

    Relative data paths begin at `root`, else where provenance.json beside an exported file says,
    else in the current folder.

    Raises:
        StudyError: every problem found, a line each.
    """
    path = Path(path)
    if root is None:
        root = (find_json(path.parent / "provenance.json") or {}).get("root")
    return parse_study(_read(path), path=str(path), root=root, kind=SettingFile)


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _MAX_BYTES else ""
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise StudyError(
            f"{path} does not exist." + (f" Found there: {', '.join(near)}." if near else "")
        ) from None
    except IsADirectoryError:
        near = sorted(str(p) for p in path.glob("*.yaml"))
        raise StudyError(
            f"{path} is a folder; give a study file"
            + (f". Found there: {', '.join(near)}." if near else ", e.g. study.yaml")
        ) from None
    except UnicodeDecodeError as error:
        raise StudyError(
            f"{path} is not UTF-8 text (byte {error.start + 1}); save it as UTF-8, or give the "
            "study file"
        ) from error
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}; check the path") from error
    if size > _MAX_BYTES:
        raise StudyError(f"{path} has {size} bytes; a study file has at most {_MAX_BYTES}.")
    return text


def parse_study(
    text: str,
    *,
    path: str,
    root: Path | str | None = None,
    name: str | None = None,
    kind: type[StudyFile] = StudyFile,
) -> Study:
    """Like :func:`load_study`, for the text of a study file.

    `name` is what a study is called whose text does not say it; that of the file, if left out.
    """
    content, spots = parse_yaml(text, path)
    problems = Problems(path, spots, tags=(*DESIGNS, *SEEDS))
    file, recipe = _validate(content, kind, problems)
    name = file.name if file.name is not None else name or Path(path).stem
    if fault := find_study_fault(name):
        problems.add(("name",), fault)
    resolved = _resolve_baseline(file, recipe, problems)
    sequential = file.seeds if isinstance(file.seeds, SequentialSeeds) else None
    seeds = tuple(range(file.seeds.max)) if isinstance(file.seeds, SequentialSeeds) else file.seeds
    declared = recipe.metrics(recipe.Config(**file.baseline))
    objective = resolve_objective(file, declared, problems)

    factors = parse_factors(file, recipe, resolved, problems)
    nuisance, candidates = parse_nuisance(file, recipe, resolved, factors, seeds, problems)
    check_controls(file, factors, problems)
    expectations = parse_hypothesis(file, factors, problems)
    problems.raise_if_any()
    factors = tuple(
        replace(factor, twins=find_twins(factor, file, recipe, factors)) for factor in factors
    )
    check_design(file, factors, problems, fields=resolved)
    for key, message in markers.check_thresholds(file.markers):
        problems.add(("markers", *key), message)
    problems.raise_if_any()
    return Study(
        name=name,
        source=Source(path, text),
        recipe=file.recipe,
        baseline=file.baseline,
        factors=(*factors, *nuisance),
        candidates=candidates,
        controls=frozenset(
            (name, level) for name in file.controls for level in file.controls[name]
        ),
        hypothesis=expectations,
        design=file.design,
        confirm=file.confirm,
        seeds=tuple(seeds),
        sequential=sequential,
        objective=objective,
        metrics=declared,
        gang=file.gang,
        budget=file.budget,
        markers=file.markers,
        root=str(Path(root or ".").resolve()),
        checkpoints=file.checkpoints,
        notify=tuple(file.notify),
    )


def _validate(
    content: Mapping[str, Any], kind: type[StudyFile], problems: Problems
) -> tuple[StudyFile, Recipe]:
    """The file's keys, each of its kind, and the recipe that they name."""
    try:
        file = kind.model_validate(drop_notes(content))
    except ValidationError as error:
        problems.add_validation(error, (), kind)
        _look_on(content, error, problems)
        raise problems.error() from None
    try:
        return file, load(file.recipe)
    except ValueError as error:
        problems.add(("recipe",), str(error))
        raise problems.error() from None


def _resolve_baseline(file: StudyFile, recipe: Recipe, problems: Problems) -> dict[str, Any]:
    """The baseline with every field; all problems so far are raised."""
    if "seed" in file.baseline:
        problems.add(
            ("baseline", "seed"),
            "a seed is a replicate, not a setting: remove it and list it under seeds",
        )
    resolved = resolve(recipe, file.baseline, {}, problems, ("baseline",))
    if resolved is None:
        _look_at_factors(file, recipe, problems)
    problems.raise_if_any()
    assert resolved is not None
    return resolved


def _look_on(content: Mapping[str, Any], error: ValidationError, problems: Problems) -> None:
    """Note what is wrong with baseline and factors, too, where other keys are wrong or missing."""
    wrong = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
    rest = {key: value for key, value in content.items() if key not in wrong}
    if "recipe" not in rest or "baseline" not in rest:
        return
    try:
        file = SettingFile.model_validate({"seeds": [0], **rest})
        recipe = load(file.recipe)
    except ValidationError:
        return
    except ValueError as unknown:
        problems.add(("recipe",), str(unknown))
        return
    resolved = resolve(recipe, file.baseline, {}, problems, ("baseline",))
    if resolved is None:
        _look_at_factors(file, recipe, problems)
    else:
        parse_factors(file, recipe, resolved, problems)


def _look_at_factors(file: StudyFile, recipe: Recipe, problems: Problems) -> None:
    """Note what is wrong with the factors of a baseline whose wrong fields are left out."""
    sound = {
        name: value for name, value in file.baseline.items() if not problems.at(("baseline", name))
    }
    factors = {
        name: spec
        for name, spec in file.factors.items()
        if name in sound or name not in file.baseline
    }
    resolved = resolve(recipe, sound, {}, Problems("", {}), ("baseline",))
    if resolved is not None:
        left = file.model_copy(update={"baseline": sound, "factors": factors})
        parse_factors(left, recipe, resolved, problems)
