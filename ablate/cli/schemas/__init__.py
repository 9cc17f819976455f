"""What each verb prints with --json: a JSON schema for each, beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ablate.errors import StudyError, suggest

_FOLDER = Path(__file__).parent


def verbs() -> tuple[str, ...]:
    """Verbs that have one; ``markers replay`` is written with a blank."""
    return tuple(sorted(path.stem.replace("_", " ") for path in _FOLDER.glob("*.json")))


def schema_of(verb: str) -> dict[str, Any]:
    """The schema of a verb's JSON.

    Raises:
        StudyError: there is no such verb, or it prints none.
    """
    known = verbs()
    if verb not in known:
        raise StudyError(f"{verb!r} is no verb that prints JSON; {suggest(verb, known)}")
    found = _read(f"{verb.replace(' ', '_')}.json")
    shared = found.pop("$ref", None)  # of verbs that end with the same picture
    return found if shared is None else {**_read(shared), **found}


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_FOLDER / name).read_text(encoding="utf-8"))
    return found
