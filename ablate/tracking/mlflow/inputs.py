"""The data that a study reads, as MLflow's datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

from ablate.records.masking import masked_url
from ablate.trial.recipe import Role, fields_of, load

_MOST_NAME = 60


def inputs_of(recipe: str, config: Mapping[str, Any]) -> dict[str, DatasetInput]:
    """Field -> dataset, for each field of a configuration that is a path.

    The digest is of the place: what the data are was not asked of it.
    """
    found = {}
    for field in sorted(fields_of(load(recipe).Config, Role.PATH)):
        place = config.get(field)
        if not isinstance(place, str) or not place:
            continue
        shown = masked_url(place)
        data = Dataset(
            name=name_of(shown),
            digest=hashlib.sha256(shown.encode()).hexdigest()[:8],
            source_type="local",
            source=json.dumps({"uri": shown}),
            profile=json.dumps({"field": field}),
        )
        found[field] = DatasetInput(data, [InputTag("mlflow.data.context", field)])
    return found


def name_of(place: str) -> str:
    """The last two parts of a path, without what follows a pattern's brace: ``cc3m/train``."""
    parts = PurePosixPath(place.split("::", 1)[0].split("?", 1)[0]).parts
    tail = [part.split("{", 1)[0].split("*", 1)[0].rstrip("-_.") for part in parts[-2:]]
    return "/".join(part for part in tail if part and part != "/")[-_MOST_NAME:] or "data"
