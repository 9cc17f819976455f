"""Finished models, measured by the recipe's own evaluations."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ablate.errors import DataError
from ablate.study import load_setting
from ablate.trial.recipe import ability, able, absolute, load


@dataclass(frozen=True, slots=True)
class Asked:
    """Data to measure on, beside or in place of a setting's own."""

    images: str | None = None
    """Labelled: a folder of class folders, or shards with class numbers."""
    train_images: str | None = None
    """Labelled images that neighbours and probes learn from; the others of `images` if none."""
    pairs: str | None = None
    """Shards of images and captions."""
    kinds: tuple[str, ...] = ()
    """Kinds of evaluation; all that the data allow if empty."""


def evaluate(
    source: str,
    asked: Asked,
    *,
    like: Path | None = None,
    name: str | None = None,
    root: Path | None = None,
    recipe: str | None = None,
) -> dict[str, float]:
    """What a model measures: on the data that are `asked`, else on those of the setting `like`.

    `name` is the architecture of a file of weights. The objective of `like` comes first.

    Raises:
        LoadError: the model cannot be loaded.
        AbilityError: the recipe measures no finished models.
        DataError: the data cannot be used.
    """
    study = load_setting(like, root=root) if like is not None else None
    chosen = study.recipe if study else able("evaluate", given=recipe)
    measure = ability(chosen, "evaluate")
    config = None
    if study is not None:
        given = load(chosen).Config(**study.config(study.cell({}), seed=0))
        config = absolute(given, root=Path(study.root))
    fields: dict[str, Any] = {}
    if asked != Asked():
        placed = {
            key: _place(value) if isinstance(value, str) else value
            for key, value in asdict(asked).items()
        }
        try:
            fields = ability(chosen, "choose_evaluations")(**placed)
        except ValueError as error:
            raise DataError(str(error)) from error
    if name is not None:
        fields["model"] = name
    found = measure(source, config, fields=fields)
    first = [study.objective.metric] if study and study.objective.metric in found else []
    return {key: found[key] for key in dict.fromkeys([*first, *found])}


def _place(path: str) -> str:
    """Absolute, also each source of several that are joined with ``::``."""
    return "::".join(os.path.abspath(part) for part in path.split("::"))
