"""What is certain before a step is taken: settings that do nothing or cannot work, and what the
data on this machine say. Nothing here imports torch."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError
from ablate.recipes.openclip.classes import class_folders, zero_shot_classes
from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.data import lost_samples, open_index, open_train_index

if TYPE_CHECKING:
    from ablate.training.data.shards import ShardIndex

FLAT_SHARE = 0.2
"""Share of pictures of one colour, among a few that are looked at, above which it is told."""


def check_settings(
    config: Config, model: dict[str, Any], *, workers: int, steps: int | None
) -> list[str]:
    """Warnings about settings; `model` is open_clip's description, empty where it is not known.

    Raises:
        ValueError: no step can be taken, or a setting does nothing, so that its levels would be
            the same run.
    """
    whole = config.batch_size * workers * config.accum_freq
    if steps == 0:
        raise ValueError(
            f"an epoch has no whole step of {whole} samples (batch_size x workers x accum_freq), "
            "so the run would have none; lower batch_size or accum_freq, or give more data"
        )
    if whole == 1 and not config.siglip:
        raise ValueError(
            "a step sees one pair, and the softmax over one pair is 1 whatever the model: loss and "
            "gradient are always 0. Raise batch_size, workers or accum_freq"
        )
    if config.model.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(
            f"model: {config.model} brings weights of its own, which no record would name. Give "
            "the architecture's name as model, and the weights as init_from (path: their file)"
        )
    if "multimodal_cfg" in model:
        raise ValueError(
            f"model {config.model} learns to write captions (CoCa), and its loss is not offered "
            "here; take a model of two towers"
        )
    resnet = isinstance(model.get("vision_cfg", {}).get("layers"), list)
    if resnet and config.force_patch_dropout:
        raise ValueError(
            f"force_patch_dropout does nothing with {config.model}, a ResNet without patches; "
            "remove it"
        )
    warnings = _check_qk_norm(config, model)
    timm = config.aug_cfg.use_timm
    if config.image_interpolation == "random" and not timm:
        raise ValueError(
            "image_interpolation: random does nothing without aug_cfg.use_timm; set that, or "
            "remove it"
        )
    if config.image_interpolation is not None and not timm:
        warnings.append(
            f"image_interpolation {config.image_interpolation} changes how evaluation images are "
            "resized; training's are resized by bicubic whatever it says, unless aug_cfg.use_timm"
        )
    if config.fast_jpeg:
        warnings.append(
            "fast_jpeg decodes at a size that follows aug_cfg.scale: levels of another scale are "
            "compared at another resolution, too"
        )
    return warnings


def _check_qk_norm(config: Config, model: dict[str, Any]) -> list[str]:
    if not config.qk_norm:
        return []
    image, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    outside = {
        "image": isinstance(image.get("layers"), list) or "timm_model_name" in image,
        "text": "hf_model_name" in text,
    }
    named = [name for name, foreign in outside.items() if foreign]
    if len(named) == 2:
        raise ValueError(
            f"qk_norm does nothing with {config.model}: neither of its towers is a transformer of "
            "open_clip's own; remove it"
        )
    return [
        f"qk_norm: the {name} tower of {config.model} is no transformer of open_clip's own and "
        "stays as it is; the other one has it"
        for name in named
    ]


def check_data(config: Config, *, workers: int) -> list[str]:
    """Warnings about the data of a configuration whose paths are absolute, as far as they lie on
    this machine.

    Raises:
        DataError: they cannot be used; says which and what to change.
    """
    found = _check_evaluations(config)
    if config.train_data is None or not _is_here(config.train_data):
        return found  # a machine that only plans
    index = open_train_index(config)
    amount = _check_amount(config, index, workers=workers)
    return [*amount, *_check_samples(config, index), *found]


def _check_amount(config: Config, index: ShardIndex, *, workers: int) -> list[str]:
    size, given = index.num_samples, config.train_num_samples
    whole = config.batch_size * workers * config.accum_freq
    if whole > size:
        return [
            f"a step of {whole} samples is larger than the {size} of train_data: {whole - size} "
            "pairs or more stand in it twice, as each other's negatives"
        ]
    if given is not None and given >= size + whole:
        return [
            f"an epoch of train_num_samples {given} passes {given / size:.3g} times over the "
            f"{size} samples of train_data, each time in another order with other augmentations"
        ]
    return []


def _check_samples(config: Config, index: ShardIndex) -> list[str]:
    """What was left out, what is trained on though it shows nothing."""
    from ablate.training.data.shard_scan import FAULTS, SEEN_SAMPLES

    size, faults = index.num_samples, index.num_faults
    found = []
    if lost := lost_samples(index):
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(faults.items()))
        found.append(f"{lost} samples of train_data are left out ({kinds})")
    for kind in SEEN_SAMPLES:
        if count := faults.get(kind):
            found.append(f"{count} of {size} images of train_data: {FAULTS[kind]}")
    flat, seen = _count_flat(index)
    if flat > FLAT_SHARE * seen:
        found.append(
            f"{flat} of {seen} pictures of train_data that were looked at are of one colour "
            "(ablate data check tells of all)"
        )
    return found


@lru_cache(maxsize=4)  # the cells of a study mostly train on one set
def _count_flat(index: ShardIndex, most: int = 32) -> tuple[int, int]:
    """How many of a few pictures from the whole set are of one colour, and of how many."""
    import numpy as np

    from ablate.training.data.decode import read_pair

    places = np.linspace(0, index.num_samples - 1, min(most, index.num_samples)).astype(int)
    pictures = [pair[0] for place in places.tolist() if (pair := read_pair(index, place))]
    flat = sum(bool((p.reshape(-1, 3) == p.reshape(-1, 3)[0]).all()) for p in pictures)
    return flat, len(pictures)


def _check_evaluations(config: Config) -> list[str]:
    """What is told of the data that are here."""
    found = []
    named = [] if config.imagenet_val is None else [("imagenet_val", config.imagenet_val)]
    for spec in config.evaluations:
        what, path = f"evaluation {spec.kind}{spec.label}", spec.path or config.imagenet_val
        assert path is not None, "Config refuses an evaluation without data"
        if spec.kind == "zero_shot":
            named.append((what, path))
            continue
        train = getattr(spec, "train_path", None)
        if not all(_is_here(each) for each in (path, train) if each is not None):
            continue
        if spec.kind == "retrieval":
            open_index(path)
        elif train is not None and not path.endswith(".tar") and not train.endswith(".tar"):
            _check_pairing(what, Path(path), Path(train))
    for what, path in named:
        if not _is_here(path):
            continue
        names, _ = zero_shot_classes(path)
        found += [
            f"{what}: {count} classes are called {name!r}, and none can be told from the others"
            for name, count in Counter(names).items()
            if count > 1
        ]
    return found


def _is_here(path: str) -> bool:
    from ablate.training.data.shard_names import expand_shards

    return all(Path(each).exists() for each in expand_shards(path))


def _check_pairing(what: str, path: Path, train: Path) -> None:
    """Raise DataError for a class that is judged and was never learnt."""
    judged, learnt = ({each.name for each in class_folders(place)} for place in (path, train))
    if lacking := sorted(judged - learnt):
        raise DataError(
            f"{what}: {len(lacking)} of {len(judged)} classes of {path} are no folder of {train} "
            f"({', '.join(lacking[:3])}), so nothing can answer them; give both the same classes"
        )
