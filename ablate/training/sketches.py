"""What a model and its optimizer amount to, remembered on this machine by what they are made from.

Imports no torch: a plan whose shapes were sketched before needs none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel

from ablate.records.files import dumps, find_json, write_json
from ablate.records.provenance import code_of_here
from ablate.training.data.cache import cache_folder, key

C = TypeVar("C", bound=BaseModel)


def shape_of(config: C, *, without: frozenset[str]) -> C:
    """The configuration with its defaults in the fields that no sketch is made from.

    So a sketch cannot hang on one of these, and configurations that differ in nothing else share
    one; a field that nobody thought of makes sketches of its own.
    """
    return config.model_copy(update=_usual(type(config), without))


@cache
def _usual(config: type[BaseModel], names: frozenset[str]) -> dict[str, Any]:
    """The defaults of these fields."""
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in config.model_fields.items()
        if name in names
    }


def remember(
    kind: str, config: BaseModel, architecture: Mapping[str, Any], make: Callable[[], Any]
) -> Any:
    """What `make` gives for this configuration, as JSON; made once on this machine by this code.

    `architecture` describes the model that the configuration names; one that is empty is known to
    this process alone. Neither that nor an error is remembered.
    """
    if not architecture:
        return make()
    made_from = config.model_dump_json(), dumps(architecture), *sorted(code_of_here().items())
    name = key(kind, *made_from)
    path = cache_folder() / "sketches" / f"{name}.json"
    found = find_json(path)
    if found is None:
        found = {"sketch": make()}
        with contextlib.suppress(OSError):  # it is made again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found, durable=False)
    return found["sketch"]


def sentence(described: Mapping[str, Any]) -> str:
    """Parameter groups, as :func:`ablate.training.optim.describe` counts them, in words."""
    parts = [
        f"{name} (weight decay {group['weight_decay']:g}): {group['tensors']} tensors of "
        f"{group['parameters']:,} numbers"
        for name, group in described.items()
        if name != "hash"
    ]
    return f"parameter groups {described['hash']}: {'; '.join(parts)}"
