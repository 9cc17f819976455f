"""Folders of runs as trainers leave them: open_clip 2.x and 3.x, timm, Lightning, Hugging Face's
Trainer, TensorBoard.

A run's settings are those of the file that its trainer wrote (params.txt, args.yaml, hparams.yaml,
config.json), and what its folder is called where that reads ``lr=0.1,wd=0.2``, as Hydra does.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ablate.errors import AnalysisError
from ablate.markers.foreign import ForeignError, read_foreign
from ablate.markers.foreign.events import read_events
from ablate.markers.foreign.run import Evaluated
from ablate.study.elsewhere import Made, flat, number
from ablate.trial.trainers import known_trainers

Records = Sequence[Mapping[str, Any]]

_SETTINGS = (
    "params.txt", "args.yaml", "hparams.yaml", "config.yaml", "config.json", "hparams.json",
    ".hydra/config.yaml",
)  # fmt: skip
_PAIR = re.compile(r"([A-Za-z_][\w.]*)=([^,/ ]+)")
_PYTHON = re.compile(r"!!python/\S+")
"""Tags by which trainers write objects of theirs: what stands behind is read as plain values."""
_STEPS = ("step", "global_step", "_step")
_DEEPEST = 6


def read_runs(folder: Path) -> list[Made]:
    """Every run below `folder`, by its path.

    Raises:
        AnalysisError: none is there.
    """
    found = [_made(place, folder) for place in _runs(folder, 0)]
    if not found:
        raise AnalysisError(
            f"{folder} holds no run: no folder in it has {', '.join(KINDS)} or event files"
        )
    return found


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    if _kind(folder) is not None:
        yield folder
    elif depth < _DEEPEST:
        for below in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from _runs(below, depth + 1)


def _kind(folder: Path) -> Callable[[Path], Records] | None:
    for name, read in KINDS.items():
        if any(folder.glob(name)):
            return read
    return None


def _made(folder: Path, top: Path) -> Made:
    read = _kind(folder)
    assert read is not None
    notes: list[str] = []
    try:
        records = read(folder)
    except (OSError, ValueError) as error:
        records, notes = (), [f"its measurements cannot be read: {error}"]
    values: dict[str, float] = {}
    curves = []
    for place, record in enumerate(records, start=1):
        row = {
            name: float(value)
            for name, text in record.items()
            if type(value := number(text)) in (int, float)
        }
        values |= {name: value for name, value in row.items() if name not in _STEPS}
        step = next((row[name] for name in _STEPS if name in row), row.get("epoch", place))
        curves.append({**row, "step": int(step)})
    rows, about = _judged(folder, notes)
    name = str(folder.relative_to(top)) if folder != top else folder.name
    return Made(
        name=name,
        settings={**_settings(folder), **_said(folder), **dict(_PAIR.findall(name))}
        or _hparams(folder),
        values=values,
        rows=rows,
        curves=sorted(curves, key=lambda row: row["step"]),
        about=about,
        notes=notes,
    )


def _judged(folder: Path, notes: list[str]) -> tuple[Records, Mapping[str, Any]]:
    """The run's steps as the markers read them; none where it logged no training loss."""
    files = (folder / "summary.csv", folder / "metrics.csv", _state_file(folder))
    try:
        source = next((f for f in files if f is not None and f.exists()), folder)
        found = read_foreign(source, trainers=known_trainers())
    except ForeignError as error:
        notes.append(f"not judged by the markers: {error}")
        return (), {}
    notes += found.notes
    return found.rows, asdict(found.context)


def _settings(folder: Path) -> dict[str, Any]:
    for name in _SETTINGS:
        file = folder / name
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if name == "params.txt":
            parts = (line.partition(": ") for line in text.splitlines())
            found = {key.strip(): value for key, colon, value in parts if colon}
            about = frozenset[str]().union(*(each.recording for each in known_trainers()))
            return {key: value for key, value in found.items() if key not in about}
        try:
            content = yaml.safe_load(_PYTHON.sub("", text))
        except yaml.YAMLError as error:
            raise AnalysisError(f"{file} cannot be read: {error}") from None
        return flat(content) if isinstance(content, Mapping) else {}
    return {}


def _hparams(folder: Path) -> dict[str, Any]:
    """What TensorBoard's add_hparams wrote, in a folder of its own below the run's."""
    files = sorted(folder.rglob("*tfevents*"))
    if not files:
        return {}
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for file in files:
        for record in EventFileLoader(str(file)).Load():
            for value in record.summary.value if record.HasField("summary") else ():
                if value.tag != "_hparams_/session_start_info":
                    continue
                told = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                found = told.session_start_info.hparams
                return {name: getattr(v, v.WhichOneof("kind")) for name, v in sorted(found.items())}
    return {}


def _said(folder: Path) -> dict[str, Any]:
    """What Hugging Face's Trainer says of its settings beside its log."""
    file = _state_file(folder)
    if file is None:
        return {}
    state = json.loads(file.read_text(encoding="utf-8"))
    known = {name: state.get(name) for name in ("num_train_epochs", "train_batch_size")}
    return {**known, **flat(state.get("trial_params") or {})}


def _state_file(folder: Path) -> Path | None:
    """trainer_state.json of the run, or of its last checkpoint."""
    if (own := folder / "trainer_state.json").is_file():
        return own
    kept = folder.glob("checkpoint-*/trainer_state.json")
    return max(kept, key=lambda path: int(path.parent.name.rpartition("-")[2]), default=None)


def _table(name: str) -> Callable[[Path], Records]:
    def read(folder: Path) -> Records:
        with open(folder / name, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return read


def _open_clip(folder: Path) -> Records:
    files = (folder / "checkpoints" / "results.jsonl", folder / "results.jsonl")
    file = next((file for file in files if file.is_file()), None)
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None else ()
    return [
        {**json.loads(line), "epoch": place}
        for place, line in enumerate((line for line in lines if line.strip("\0 ")), start=1)
    ]


def _trainer_state(folder: Path) -> Records:
    file = _state_file(folder)
    assert file is not None
    history: Records = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    return history


def _events(folder: Path) -> Records:
    files = sorted(folder.glob("*tfevents*"))
    source, evaluations = read_events(files, Evaluated(known_trainers()))
    return [*(record.values for record in source.records), *evaluations]


KINDS: Mapping[str, Callable[[Path], Records]] = {
    "params.txt": _open_clip,
    "summary.csv": _table("summary.csv"),
    "metrics.csv": _table("metrics.csv"),
    "trainer_state.json": _trainer_state,
    "checkpoint-*/trainer_state.json": _trainer_state,
    "*tfevents*": _events,
}
"""A file that makes a folder one run's, and what reads its measurements."""
