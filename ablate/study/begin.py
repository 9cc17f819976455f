"""The first draft of a study file, commented, from a recipe's beginning and a few answers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ablate.trial.recipe import Beginning, Recipe

SCHEMA_FILE = "ablate.schema.json"
"""Where editors find the schema, beside the study: ``ablate schema > ablate.schema.json``."""

_WIDTH = 100


def draft(
    name: str,
    recipe: Recipe,
    beginning: Beginning,
    *,
    file: str,
    fields: Mapping[str, Any],
    about: Sequence[str],
    seeds: int,
    workers: int,
    gpus: int,
) -> str:
    """The text of a study file of the recipe called `name`.

    `file` is where it will stand, `fields` go before the recipe's own proposals, `about` names
    questions of the beginning.
    """
    questions = [beginning.questions[key] for key in about]
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "#",
        *(f"# {question.text}" for question in questions),
        f"recipe: {name}",
        "baseline:                # the complete setting that everything is compared with",
    ]
    for field, value in {**beginning.baseline, **fields}.items():
        lines += _commented(f"  {field}: {inline(value)}", _meaning(recipe, field))
    lines.append("factors:                 # what is varied, one after the other")
    for question in questions:
        for factor, levels in question.factors.items():
            lines += _factor(factor, levels)
    controls = {key: value for question in questions for key, value in question.controls.items()}
    if controls:
        lines.append("controls:                # compared, and never handed out")
        lines += [f"  {factor}: {inline(list(levels))}" for factor, levels in controls.items()]
    lines += [
        "design: one_at_a_time    # the baseline, and every other level alone",
        "confirm: true            # at the end, what looks better alone is run together",
        f"seeds: {seeds}                 # {', '.join(map(str, range(seeds)))}: fewer than three "
        "show large differences only",
        "objective:",
        f"  metric: {beginning.metric}",
        f"  margin: {beginning.margin}          # the smallest difference that would matter to you",
        f"gang: {inline({'workers': workers, 'gpus_per_worker': 1 if gpus else 0})}"
        "   # the processes that train one trial together",
        "",
        f"# Is it valid?            ablate check {file}",
        f"# What would it cost?     ablate plan {file} --probe",
        f"# Run it, and go on:      ablate launch {file}",
        f"# Completion in editors:  ablate schema > {SCHEMA_FILE}",
    ]
    return "\n".join(lines) + "\n"


def _factor(name: str, levels: Any) -> list[str]:
    if not isinstance(levels, Mapping):
        return [f"  {name}: {inline(levels)}"]
    return [f"  {name}:", *(f"    {level}: {inline(fields)}" for level, fields in levels.items())]


def inline(value: Any) -> str:
    """A value on one line of YAML, numbers as YAML 1.1 reads them."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    text = text.removesuffix("\n").removesuffix("\n...")
    return _EXPONENT.sub(r"\1.0e", text)


_EXPONENT = re.compile(r"(?<![\w.])(\d+)e(?=[-+]?\d)")
"""A number that YAML 1.1 takes for text."""


def _meaning(recipe: Recipe, field: str) -> str:
    info = recipe.Config.model_fields.get(field)
    text = " ".join((info.description or "").split()) if info is not None else ""
    return re.split(r"(?<=[.;])\s", text)[0].rstrip(".;")


def _commented(line: str, meaning: str) -> list[str]:
    """The line with its comment behind it, or above it where both do not fit."""
    if not meaning:
        return [line]
    if len(line) <= 25 and 25 + len(meaning) + 2 <= _WIDTH:
        return [f"{line:<25}# {meaning}"]
    above = textwrap.wrap(meaning, _WIDTH - 4)
    return [*(f"  # {part}" for part in above), line]
