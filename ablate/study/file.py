"""A study file: YAML in, a `Study` out, or every problem with its line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from ablate import recipes
from ablate.errors import StudyError
from ablate.markers import thresholds as markers
from ablate.source import Problems, parse_yaml
from ablate.study.checks import check_controls, check_design
from ablate.study.levels import find_twins, parse_factors, parse_nuisance, resolve
from ablate.study.schema import DESIGNS, SequentialSeeds, StudyFile
from ablate.study.study import Study

_MAX_BYTES = 1_000_000
"""Of a study file; those written by hand have a few thousand."""


def load_study(path: Path | str, *, root: Path | str | None = None) -> Study:
    """Read, validate and resolve a study file.

    Relative data paths in it are relative to `root`, by default the current folder.

    Raises:
        StudyError: every problem found, a line each, as ``file:line: what, what is allowed``.
    """
    path = Path(path)
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
    return parse_study(text, path=str(path), root=root)


def parse_study(text: str, *, path: str, root: Path | str | None = None) -> Study:
    """Like :func:`load_study`, for the text of a study file."""
    content, lines = parse_yaml(text, path)
    problems = Problems(path, lines, tags=(*DESIGNS, "SequentialSeeds"))
    try:
        file = StudyFile.model_validate(content)
    except ValidationError as error:
        problems.add_validation(error, (), StudyFile)
        raise problems.error() from None
    try:
        recipe = recipes.load(file.recipe)
    except ValueError as error:
        problems.add(("recipe",), str(error))
        raise problems.error() from None

    if "seed" in file.baseline:
        problems.add(
            ("baseline", "seed"),
            "a seed is a replicate, not a setting: remove it and list it under seeds",
        )
    seeds = tuple(range(file.seeds.max)) if isinstance(file.seeds, SequentialSeeds) else file.seeds
    resolved = resolve(recipe, file.baseline, {}, problems, ("baseline",))
    problems.raise_if_any()
    assert resolved is not None

    factors = parse_factors(file, recipe, resolved, problems)
    nuisance, candidates = parse_nuisance(file, recipe, resolved, factors, seeds, problems)
    check_controls(file, factors, problems)
    problems.raise_if_any()
    factors = tuple(
        replace(factor, twins=find_twins(factor, file, recipe, factors)) for factor in factors
    )
    check_design(file, factors, problems)
    for key, message in markers.check_thresholds(file.markers):
        problems.add(("markers", *key), message)
    problems.raise_if_any()
    return Study(
        name=file.name or re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem),
        path=path,
        recipe=file.recipe,
        baseline=file.baseline,
        factors=(*factors, *nuisance),
        candidates=candidates,
        tuning_seeds=tuple(file.nuisance.seeds) if file.nuisance else (),
        controls=frozenset(
            (name, level) for name in file.controls for level in file.controls[name]
        ),
        design=file.design,
        seeds=tuple(seeds),
        sequential=file.seeds if isinstance(file.seeds, SequentialSeeds) else None,
        objective=file.objective,
        gang=file.gang,
        budget=file.budget,
        markers=file.markers,
        root=str(Path(root or ".").resolve()),
        checkpoints=file.checkpoints,
        text=text,
    )
