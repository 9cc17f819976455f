"""What `ablate init` has to know: from options, and from the person at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer
import yaml

from ablate.errors import StudyError, suggest
from ablate.trial.recipe import Beginning, Recipe, ability, find_ability, load, usable


@dataclass(frozen=True, slots=True)
class Asked:
    """The answers, complete."""

    recipe: str
    gpus: int
    beginning: Beginning
    fields: Mapping[str, Any]
    about: tuple[str, ...]


def ask_for(
    recipe: str | None,
    gpus: int | None,
    about: Sequence[str] | None,
    changes: Sequence[str] | None,
) -> Asked:
    """Options as they are; what they leave out is asked for, or proposed where nobody answers.

    Raises:
        StudyError: an option names what there is not, with the nearest name.
    """
    someone = sys.stdin.isatty()
    if recipe is None:
        recipe = _usual()
        if someone:
            recipe = typer.prompt(f"What is trained ({', '.join(usable())})", default=recipe)
    try:
        found = load(recipe)
    except ValueError as error:
        raise StudyError(str(error)) from None
    if gpus is None:
        gpus = typer.prompt("GPUs of one trial", default=1, type=int) if someone else 0
    beginning = _beginning(recipe, gpus)
    fields = {}
    for change in changes or ():
        name, value = _parse_change(change, found, beginning)
        fields[name] = value
    for name in beginning.asks if someone else ():
        if name not in fields:
            fields[name] = typer.prompt(name, default=beginning.baseline[name])
    return Asked(recipe, gpus, beginning, fields, _questions(about, beginning, someone))


def _beginning(recipe: str, gpus: int = 0) -> Beginning:
    found: Beginning = ability(recipe, "beginning")(workers=max(gpus, 1), gpus=gpus)
    return found


def _usual() -> str:
    able = [name for name in usable() if find_ability(name, "beginning") is not None]
    return next((name for name in able if _beginning(name).usual), able[0])


def _questions(about: Sequence[str] | None, beginning: Beginning, someone: bool) -> tuple[str, ...]:
    if not about and someone:
        for name, question in beginning.questions.items():
            typer.echo(f"  {name:<14} {question.text}")
        said = typer.prompt("What do you ask (names, or all)", default="all")
        about = [] if said == "all" else said.replace(",", " ").split()
    for name in about or ():
        if name not in beginning.questions:
            raise StudyError(f"--about {name}: {suggest(name, beginning.questions)}")
    return tuple(dict.fromkeys(about or beginning.questions))


def _parse_change(text: str, recipe: Recipe, beginning: Beginning) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise StudyError(f"--set {text}: write FIELD=VALUE, e.g. --set batch_size=64")
    known = [*beginning.baseline, *recipe.Config.model_fields]
    if name not in known and recipe.Config.model_config.get("extra") != "allow":
        raise StudyError(
            f"--set {text}: {name!r} is no field; {suggest(name, dict.fromkeys(known))}"
        )
    # A pattern of shards starts like a YAML mapping.
    return name, value if "{" in value else yaml.safe_load(value)
