"""Whose study folder it is: two studies never share one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ablate import __version__
from ablate.errors import RecordError
from ablate.records.files import FORMAT
from ablate.records.folder import StudyRecord
from ablate.study import Study


def write_study(study: Study, record: StudyRecord) -> None:
    """Write study.json: what the folder answers."""
    record.write_study(
        {
            "format": FORMAT,
            "name": study.name,
            "path": study.source.path,
            "root": study.root,
            "text": study.source.text,
            "version": __version__,
        }
    )


def check_tenant(study: Study, record: StudyRecord) -> None:
    """That the folder is this study's: of the same file, of the same text, or with a trial of it.

    A study file may be edited at will, and it may be moved. One that came from elsewhere and has
    no trial in common would take the other study's report away.

    Raises:
        RecordError: the folder is another study's.
    """
    content = record.study()
    if not content or "text" not in content or content["text"] == study.source.text:
        return
    if _file(content) == _file({"root": study.root, "path": study.source.path}):
        return
    num_trials = 0
    for num_trials, folder in enumerate(record.records(), start=1):  # noqa: B007
        if study.recall(folder.trial()) is not None:
            return
    raise RecordError(
        f"{record.folder} belongs to another study, that of {_file(content)}, and none of its "
        f"{num_trials} trials is one of {study.source.path}. Give this study a name of its own "
        "(name: ...), or launch it with other --runs"
    )


def _file(content: Mapping[str, Any]) -> str:
    """Where the study file of a record lies, or lay."""
    root, path = str(content.get("root", "")), str(content.get("path", ""))
    return os.path.normpath(os.path.join(root, path))
