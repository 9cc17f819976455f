"""The rungs of a study: the same question asked of cheaper runs, each a study of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ablate.records.yaml_text import parse_yaml
from ablate.study.file import parse_study
from ablate.study.study import Study


def rungs(study: Study) -> list[tuple[str, Study]]:
    """(what it changes, the study) of every rung of the file's ``ladder``.

    Raises:
        StudyError: a rung cannot be run; every problem with its place.
    """
    content, _ = parse_yaml(study.source.text, study.source.path)
    ladder = content.pop("ladder", None) or []
    return [
        (
            ", ".join(f"{name}={value}" for name, value in changes.items()),
            parse_study(
                _text(study, content, changes, number),
                path=study.source.path,
                root=study.root,
            ),
        )
        for number, changes in enumerate(ladder, start=1)
    ]


def rung_name(study: Study, number: int) -> str:
    """Name of a rung's study, hence of its folder beside the whole study's."""
    return f"{study.name}-rung{number}"


def _text(study: Study, content: Mapping[str, Any], changes: Mapping[str, Any], number: int) -> str:
    """A study file of its own: what is handed out comes of the whole study alone."""
    rung = {
        **content,
        "name": rung_name(study, number),
        "baseline": {**content["baseline"], **changes},
    }
    rung.pop("confirm", None)
    head = f"# Rung {number} of {study.name}: {', '.join(changes)} of the baseline changed.\n"
    return head + yaml.safe_dump(rung, sort_keys=False, allow_unicode=True)
