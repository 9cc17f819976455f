"""The fields of a trial that a command of the user's trains."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ablate.errors import suggest
from ablate.trial.recipe import Role

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
GIVEN = ("seed", "checkpoints", "folder", "attempt")
"""Placeholders that are filled beside the fields."""


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Measured(_Frozen):
    """What the command says it measures."""

    direction: Literal["maximize", "minimize"] = "maximize"
    """Which way is better."""
    unit: str = ""
    """Its unit; fraction for shares, which are then shown in per cent."""
    chance: float | None = None
    """What guessing scores: what a diverged run counts with."""


class Config(_Frozen):
    """A program that trains and says what it measures.

    Every further field of the baseline is a parameter: it fills its placeholder, and can be a
    factor.
    """

    model_config = ConfigDict(
        frozen=True, extra="allow", use_attribute_docstrings=True, allow_inf_nan=False
    )

    command: Annotated[str, Field(min_length=1)]
    """The line to run, without a shell; {lr} is filled from the field lr, {seed}, {checkpoints}
    (a folder that outlives attempts), {folder} (the trial's) and {attempt} (its number) are always
    there. ``python`` as its
    first word is the interpreter that runs ablate."""
    metrics: Annotated[dict[str, Measured], Field(min_length=1)]
    """What it measures, by name, {accuracy: maximize}, and says in a line of JSON on its output,
    {"accuracy": 0.4}; also {accuracy: {direction: maximize, unit: fraction, chance: 0.1}}. The
    first is the objective where the study names none."""
    patterns: tuple[str, ...] = ()
    """Regular expressions with named groups, for lines that are no JSON:
    step (?P<step>\\d+) loss (?P<loss>\\S+)."""
    table: str | None = None
    """A metrics.csv that it writes, or a folder of TensorBoard event files; placeholders are
    filled."""
    steps: int | str | None = None
    """Steps of the whole run, or the placeholder that says so; unknown when empty."""
    every: Annotated[int, Field(ge=1)] = 1
    """Steps between two lines of measurements; above 1 ``verify`` holds it to that."""
    cwd: Annotated[str, Role.PATH] = "."
    """Folder in which it runs."""
    env: dict[str, str] = {}
    """Added to its environment; placeholders are filled."""
    patience_s: Annotated[float, Field(gt=0), Role.FREE] = 600.0
    """Without a line for so long it is taken to hang."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fills {seed}; also in ABLATE_SEED."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return {name: {} for name in value}
        if not isinstance(value, Mapping):
            return value
        return {
            name: {"direction": item} if isinstance(item, str) else item or {}
            for name, item in value.items()
        }

    @field_validator("patterns")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                names = re.compile(pattern).groupindex
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
            if not names:
                raise ValueError(
                    f"pattern {pattern!r} names no group; write (?P<loss>...) where the loss stands"
                )
        return value

    @model_validator(mode="after")
    def _filled(self) -> Config:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ValueError(f"command {self.command!r} cannot be split: {error}") from None
        if not words:
            raise ValueError("command is empty; write the line that trains")
        parameters = self.parameters
        texts = (*words, self.table or "", str(self.steps or ""), *self.env.values())
        asked = {name for text in texts for name in PLACEHOLDER.findall(text)}
        for name in sorted(asked - {*parameters, *GIVEN}):
            raise ValueError(
                f"no field fills {{{name}}}; {suggest(name, [*parameters, *GIVEN])}. Add {name} to "
                "the baseline"
            )
        for name in sorted(set(parameters) - asked):
            raise ValueError(
                f"{name} has no placeholder in the command, so it would change nothing; write "
                f"{{{name}}} where it belongs"
            )
        if isinstance(self.steps, str):
            self.num_steps  # noqa: B018  # refuses what is no number
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The fields of the user's own."""
        return dict(self.model_extra or {})

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, where they are known."""
        if self.steps is None:
            return None
        text = fill(str(self.steps), self.parameters)
        if not text.isdigit() or int(text) == 0:
            raise ValueError(f"steps {self.steps!r} is {text!r}, and must be a number above 0")
        return int(text)

    def line(self, *, checkpoints: Path | str, folder: Path | str, attempt: int = 1) -> list[str]:
        """The words of the command, filled."""
        values = self.values(checkpoints=checkpoints, folder=folder, attempt=attempt)
        return [fill(word, values) for word in shlex.split(self.command)]

    def values(
        self, *, checkpoints: Path | str, folder: Path | str, attempt: int
    ) -> dict[str, Any]:
        """What placeholders are filled with."""
        given = {"seed": self.seed, "checkpoints": str(checkpoints), "folder": str(folder)}
        return {**self.parameters, **given, "attempt": attempt}


def fill(text: str, values: Mapping[str, Any]) -> str:
    """`text` with its placeholders filled; those without a value stay."""

    def value_of(found: re.Match[str]) -> str:
        value = values.get(found[1], found[0])
        return value if isinstance(value, str) else json.dumps(value)

    return PLACEHOLDER.sub(value_of, text)
