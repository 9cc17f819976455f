"""The command line within the tests' own process."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ablate.cli import app
from ablate.cli.schemas import schema_of, verbs


@dataclass(frozen=True, slots=True)
class Said:
    """How a command ended, and its two streams."""

    code: int
    out: str
    err: str


def verb_of(arguments: tuple[str, ...]) -> str:
    """The verb of a command line, as its schema is called."""
    first, second = arguments[0], arguments[1] if len(arguments) > 1 else ""
    if "--commands" in arguments:
        return f"{first} commands"
    if first == "markers" and second not in ("replay", "import"):
        return "markers replay"
    return f"{first} {second}" if f"{first} {second}" in verbs() else first


def refuse_other_json(arguments: tuple[str, ...], text: str) -> None:
    """Whatever a verb prints with --json in any test keeps to the schema of that verb, and has no
    key that the schema leaves out."""
    verb = verb_of(arguments)
    if verb in verbs():  # a recipe's data set has words of its own
        jsonschema.validate(json.loads(text), closed(schema_of(verb)))


def closed(schema: Any) -> Any:
    """The schema with no room beside the keys that it names."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {"additionalProperties": False, **inner} if "properties" in schema else inner


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["ablate", *arguments])
        with pytest.raises(SystemExit) as caught:
            app.main()
            sys.exit(0)
        said = capsys.readouterr()
        code = caught.value.code
        if "--json" in arguments and said.out:
            refuse_other_json(arguments, said.out)
        return Said(code if isinstance(code, int) else 1, said.out, said.err)

    return call
