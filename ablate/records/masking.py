"""What must not be shown: secrets, passwords in URLs, files outside a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablate.records.files import dumps

_SECRET = re.compile(r"(?i)(passw|secret|token|credential|api_?key|access_?key|private_?key)")

_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")

_SIGNATURE = re.compile(r"(?i)([?&](?:[a-z0-9-]*(?:signature|token|credential|key))=)[^&\s]+")

_ARTIFACT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_LARGEST_ARTIFACT = 64 * 2**20


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names, values as text, secrets masked."""
    found: dict[str, str] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            shown = masked(name, value)
            found[name] = shown if isinstance(shown, str) else dumps(shown)
    return found


def masked(key: str, value: Any) -> Any:
    """`value` without what must not be shown: secrets by their name, passwords inside URLs."""
    if isinstance(value, Mapping):
        return {name: masked(str(name), item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(key, item) for item in value]
    if _SECRET.search(key) and value not in (None, "", False):
        return "***"
    return masked_url(value) if isinstance(value, str) else value


def masked_url(text: str) -> str:
    return _SIGNATURE.sub(r"\1***", _USERINFO.sub("***@", text))


def reason_of(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return masked_url(lines[0][:300]) if lines else type(error).__name__


def artifact_path(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder` if it may be shown: plain names only, and no way out by links.

    None for a file that is missing, too large, or anything else than a file inside the folder.
    """
    if not all(_ARTIFACT_NAME.fullmatch(part) for part in name.split("/")):
        return None
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        return None
    return path if path.stat().st_size <= _LARGEST_ARTIFACT else None
