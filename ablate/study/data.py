"""The files and folders that a study's trials read, and which of them are not here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ablate.study.study import Study
from ablate.training.data.shard_names import expand_shards
from ablate.trial.recipe import absolute, find_ability, load, paths_in
from ablate.words import counted


def data_of(study: Study) -> dict[str, list[Path]]:
    """Field -> what the baseline, or the baseline with one level of a factor, reads by it.

    Raises:
        DataError: a pattern of shards cannot be expanded; says why.
    """
    found: dict[str, dict[Path, None]] = {}
    for field, pattern in dict.fromkeys(_patterns(study)):
        named = {Path(path): None for path in expand_shards(pattern)}
        found.setdefault(field, {}).update(named)
    return {field: list(paths) for field, paths in found.items()}


def find_missing(study: Study) -> list[str]:
    """What is read and does not exist on this machine: a sentence for each field."""
    sentences = []
    for field, paths in data_of(study).items():
        missing = [path for path in paths if not path.exists()]
        if missing:
            others = len(missing) - 1
            more = f" and {counted(others, 'other')} of {len(paths)} are" if others else " is"
            sentences.append(f"{field}: {missing[0]}{more} not on this machine")
    return sentences


def _patterns(study: Study) -> Iterator[tuple[str, str]]:
    recipe = load(study.recipe)
    root, reads = Path(study.root), find_ability(study.recipe, "reads")
    changes = [{}, *(dict(level.fields) for factor in study.factors for level in factor.levels)]
    for fields in changes:
        with suppress(ValueError):  # a level that only goes with another one
            config = absolute(recipe.Config(**{**study.baseline, **fields}), root=root)
            yield from paths_in(config)
            yield from reads(config) if reads else ()
