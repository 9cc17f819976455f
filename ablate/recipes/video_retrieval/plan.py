"""What a configuration amounts to before anything runs."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ablate.errors import DataError, suggest
from ablate.recipes.video_retrieval.config import Config
from ablate.recipes.video_retrieval.model import MODELS, describe_start, sketch
from ablate.training.counts import count_evaluations
from ablate.training.sketches import sentence
from ablate.trial.extras import refuse_without
from ablate.trial.metrics import Metric
from ablate.trial.precision import slow_on_cpu
from ablate.trial.recipe import Note, Outline, absolute

if TYPE_CHECKING:
    from ablate.training.data.clips import ClipSource

METRICS = tuple(
    Metric(f"{way}_r{k}", "fraction", f"{what} recall at {k}", "maximize")
    for way, what in (("t2v", "text-to-video"), ("v2t", "video-to-text"))
    for k in (1, 5, 10)
)


def metrics(config: Config) -> tuple[Metric, ...]:
    """What a run may be judged by."""
    return METRICS


def outline(config: Config, *, workers: int, gpus: int, root: Path, deep: bool = False) -> Outline:
    """What `config` amounts to on `workers`; `deep` sketches the model with torch.

    Raises:
        ValueError: it cannot run there; says why and what to change.
        LoadError: the initial weights do not fit.
    """
    if config.train_data is None:
        raise ValueError(
            "train_data is missing; give a .json list of {video, caption}, e.g. by "
            "`ablate data emoji-video`"
        )
    _check_model(config.model)
    warnings = [] if gpus else slow_on_cpu(config.precision)
    steps, why = None, ""
    try:
        steps = steps_per_epoch(config, root=root, workers=workers) * config.epochs
    except (DataError, OSError) as error:
        if config.epoch_clips is None:
            why = str(error)
        else:
            steps = _steps(config, config.epoch_clips, workers=workers) * config.epochs
    if config.val_data is None:
        warnings.append("val_data is missing: nothing is measured but the loss")
    start = describe_start(absolute(config, root=root))
    if start is not None:
        warnings.append(start)
    elif config.freeze_vision or config.freeze_text:
        warnings.append(
            "freeze_vision or freeze_text without init_from keeps a random tower: give weights, or "
            "set both to false"
        )
    notes, size = list[Note](), None
    if deep:
        groups, state = sketch(config)
        notes.append(Note(label="decay", text=sentence(groups), facts=groups))
        size = config.keep.at_once(config.epochs) * state
    return Outline(
        measures=tuple(m.name for m in METRICS) if config.val_data is not None else (),
        measured_on={m.name: str(config.val_data) for m in METRICS},
        steps=steps,
        samples=config.batch_size * workers,
        no_steps=why,
        warmup=0 if steps is None else round(config.warmup_epochs * steps / config.epochs),
        evaluations=count_evaluations([config.eval_every], epochs=config.epochs),
        checkpoint_bytes=size,
        warnings=tuple(warnings),
        notes=tuple(notes),
    )


def steps_per_epoch(config: Config, *, root: Path, workers: int) -> int:
    """Steps of one epoch; the last is filled from its beginning.

    Raises:
        DataError: the clips are not there. ValueError: they are videos, and PyAV is missing.
    """
    from ablate.training.data.clips import needs_av

    assert config.train_data is not None
    source = open_captioned(str(root / config.train_data))
    if needs_av(source):
        refuse_without(("av",), recipe="video_retrieval", extra="video")
    return _steps(config, config.epoch_clips or len(source), workers=workers)


def _steps(config: Config, clips: int, *, workers: int) -> int:
    return math.ceil(clips / (config.batch_size * workers))


def open_captioned(place: str) -> ClipSource:
    """Clips with captions.

    Raises:
        DataError: they are not there, or have classes instead.
    """
    from ablate.training.data.clips import find_clips

    found = find_clips(place)
    if not found.texts:
        raise DataError(
            f"{place} has classes, and captions are needed: give a .json list of {{video, caption}}"
        )
    return found


def chance(config: Config, *, metric: str, root: Path) -> float | None:
    """Recall by guessing.

    Raises:
        DataError: the clips are not there.
    """
    if config.val_data is None:
        return None
    answers = len(open_captioned(str(root / config.val_data)))
    return min(1.0, int(metric.rpartition("_r")[2]) / answers)


def shorten(config: Config, *, steps: int, workers: int) -> Config:
    """A run of a few steps and one evaluation that takes the same time for each."""
    few = {"epoch_clips": steps * config.batch_size * workers, "interruption": None}
    return config.model_copy(update={**few, "epochs": 1})


def _check_model(name: str) -> None:
    """Raise ValueError for a name that open_clip does not know, with the likely one."""
    library = importlib.util.find_spec("open_clip")
    folders = [MODELS]
    if library is not None and library.origin is not None:
        folders.append(Path(library.origin).parent / "model_configs")
    known = {path.stem for folder in folders for path in folder.glob("*.json")}
    if len(known) > 1 and name not in known:
        raise ValueError(f"model {name!r} is not known; {suggest(name, sorted(known))}")
