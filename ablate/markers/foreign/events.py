"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablate.markers.foreign.columns import quantity_of
from ablate.markers.foreign.run import Evaluated, ForeignError, Source
from ablate.markers.foreign.steps import Point, in_order


def read_events(files: Sequence[Path], evaluated: Evaluated) -> tuple[Source, list[dict[str, Any]]]:
    """The scalars of one run as records, and its evaluations, which may be numbered by epoch.

    Raises:
        ForeignError: several folders have a training loss; the reader is not installed.
    """
    series = _series(files)
    folders: dict[str, set[str]] = {}
    for folder, tag in series:
        quantity, held_out = quantity_of(tag, evaluated)
        if quantity and not held_out:
            folders.setdefault(quantity, set()).add(str(folder))
    for several in map(sorted, folders.values()):
        if len(several) > 1:
            raise ForeignError(
                f"{len(several)} runs lie below one folder ({', '.join(several[:5])}); give one of "
                "them"
            )
    trained: dict[str, list[Point]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for (folder, tag), points in series.items():
        name, _ = quantity_of(tag, evaluated)
        if name in evaluated.names:
            for step, value in points:
                evaluations.setdefault(step, {"step": step})[name] = value
        else:
            trained[f"{folder.name}/{tag}" if tag in trained else tag] = points
    place = str(files[0].parent)
    ordered = [evaluations[step] for step in sorted(evaluations)]
    return Source(place, in_order(trained, place), evaluated=evaluated), ordered


def _series(files: Sequence[Path]) -> Mapping[tuple[Path, str], list[Point]]:
    """(folder, tag) -> its points, as they were written: a later file goes on where one ended."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise ForeignError(
            f"reading {files[0]} needs the tensorboard package: pip install tensorboard; or "
            "export the scalars as CSV"
        ) from error
    series: dict[tuple[Path, str], list[Point]] = {}
    for file in files:
        for record in EventFileLoader(str(file)).Load():
            for value in record.summary.value if record.HasField("summary") else ():
                kept = value.HasField("tensor")
                if kept and value.tensor.dtype == 7:  # text, as of hyperparameters
                    continue
                array = make_ndarray(value.tensor) if kept else value.simple_value
                if kept and array.size != 1:
                    continue
                point = record.step, float(array)
                series.setdefault((file.parent, value.tag), []).append(point)
    return series
