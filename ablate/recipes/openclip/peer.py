"""The way back to open_clip_train: its command line, and weights that open_clip loads."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError
from ablate.recipes.openclip import evaluation_fields as specs
from ablate.recipes.openclip.config import FAST, PEER, Augmentation, Config, Ours
from ablate.recipes.openclip.data import open_train_index
from ablate.recipes.openclip.model import describe_model
from ablate.recipes.openclip.plan import zero_shot_runs
from ablate.recipes.openclip.weights import compute_probe
from ablate.training.data.shard_names import expand_shards
from ablate.training.exported import check_features, record_features
from ablate.trial.recipe import absolute
from ablate.trial.upstream import Beside, Upstream

if TYPE_CHECKING:
    from ablate.training.data.shards import ShardIndex

ON_CPUS = Path(__file__).with_name("on_cpus.py")

REQUIREMENTS = (
    "open_clip_torch",
    "timm",
    "torch",
    "torchvision",
    "numpy",
    "webdataset",
    "braceexpand",
    "pandas",
    "ftfy",
    "regex",
)
"""What open_clip_train 3.3.0 imports; it names webdataset, braceexpand, pandas only as an extra."""


def upstream(
    config: Config,
    *,
    workers: int,
    root: Path,
    steps: int | None = None,
    faults: Mapping[str, int] | None = None,
) -> Upstream:
    """The same training by open_clip_train, as a line that runs.

    `steps` of the trial and `faults` of its shards are what was recorded; data under `root` are
    asked where they are there.

    Raises:
        ValueError: a field of our own makes this run something that the peer cannot do, or the
            peer cannot deal these shards to so many workers.
    """
    _refuse_unlike(config)
    if config.siglip and config.logit_scale_init is not None:
        raise ValueError(
            f"logit_scale_init {config.logit_scale_init} has no equal in {PEER}, which starts "
            "--siglip at 10 whatever a model file says; the exported run would differ"
        )
    config, about_data = _deal_data(config, workers=workers, root=root, steps=steps)
    config, measured, about_classes = _keep_own_classes_out(config, root=root)
    pairs, of_pairs = _measure_pairs(config)
    notes = (*about_data, *about_classes, *_tell_speed(config))
    if faults:
        listed = ", ".join(f"{count} x {kind}" for kind, count in faults.items())
        notes += (f"Of these shards the trial left samples out that {PEER} may take: {listed}.",)
    known = _knows(config.model) and not _beyond_flags(config)
    model = ("--model", config.model if known else Beside("local-dir:", "architecture"))
    files = {} if known else {"architecture/open_clip_config.json": _describe_model(config)}
    if workers > 1:
        files["on_cpus.py"] = ON_CPUS.read_text(encoding="utf-8")
    saving = ("--save-frequency", repr(config.checkpoint_frequency))
    return Upstream(
        name=PEER,
        library="open_clip",
        module="open_clip_train.main",
        arguments=(*model, *_flags(config)[2:], *pairs, *saving),
        parser="open_clip_train.params:parse_args",
        log_flags=("--logs", "--name"),
        checkpoint=f"checkpoints/epoch_{config.epochs}.pt",
        results="checkpoints/results.jsonl",
        measured={**measured, **of_pairs},
        on_cpus="on_cpus" if workers > 1 else "",
        files=files,
        requirements=REQUIREMENTS,
        notes=notes,
    )


def _tell_speed(config: Config) -> tuple[str, ...]:
    used = [name for name in FAST if getattr(config, name)]
    if not used:
        return ()
    return (
        f"The trial ran with {', '.join(used)}: the same formulas, rounded otherwise than "
        f"{PEER}, which has no flag for it. Expect the study's band, not its last digits.",
    )


def _deal_data(
    config: Config, *, workers: int, root: Path, steps: int | None
) -> tuple[Config, tuple[str, ...]]:
    """Samples of an epoch written out, and loading processes that leave the steps as they are."""
    index = _find_index(config, root=root)
    samples = config.train_num_samples
    if samples is None and index is not None:
        samples = index.num_samples
    elif samples is None and steps is not None:  # as many as make the steps that were taken
        samples = steps // config.epochs * config.accum_freq * config.batch_size * workers
    elif samples is None:
        raise ValueError(
            f"how many samples train_data {config.train_data} holds is not known here, and "
            f"{PEER} must be told. Set train_num_samples"
        )
    sizes = [shard.num_samples for shard in index.shards] if index is not None else None
    config = config.model_copy(update={"train_num_samples": samples})
    loaders = count_loaders(config, workers=workers, sizes=sizes)
    if loaders == config.workers:
        return config, ()
    return config.model_copy(update={"workers": loaders}), (
        f"--workers is {loaders} and not {config.workers}: {PEER} deals whole shards to its "
        "loading processes and rounds the batches of an epoch up to a multiple of them, which "
        "would change the number of steps.",
    )


def _keep_own_classes_out(
    config: Config, *, root: Path
) -> tuple[Config, Mapping[str, str], tuple[str, ...]]:
    """Without images that the peer would classify wrongly; and what it measures itself.

    It has ImageNet's class names and reads folders. What is not here is taken to be ImageNet.
    """
    data = config.imagenet_val
    if data is None or not zero_shot_runs(config):
        return config, {}, ()
    if not data.endswith(".tar") and not (root / data / "classnames.json").exists():
        return config, {f"imagenet_{k}": f"imagenet-zeroshot-val-{k}" for k in ("top1", "top5")}, ()
    return config.model_copy(update={"imagenet_val": None}), {}, (
        f"{PEER} has the names of ImageNet's classes only, so it trains without --imagenet-val "
        "and its last checkpoint is measured afterwards.",
    )  # fmt: skip


def _measure_pairs(config: Config) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Flags with which the peer measures the retrieval that is asked for, and its names for it.

    It takes one set of pairs.
    """
    asked = [spec for spec in config.evaluations if isinstance(spec, specs.RetrievalEvaluation)]
    if len(asked) != 1 or asked[0].path is None:
        return (), {}
    [spec] = asked
    ways = {"i2t": "image_to_text", "t2i": "text_to_image"}
    names = {
        f"retrieval_{way}_r{k}{spec.label}": f"{theirs}_R@{k}"
        for way, theirs in ways.items()
        for k in (1, 5, 10)
    }
    return (*_flag("val_data", spec.path), *_flag("val_frequency", spec.every)), names


def _find_index(config: Config, *, root: Path) -> ShardIndex | None:
    """The index of train_data, where the shards are here."""
    try:
        return open_train_index(absolute(config, root=root))
    except DataError:
        return None


def count_loaders(config: Config, *, workers: int, sizes: Sequence[int] | None = None) -> int:
    """Loading processes of each worker with which the peer takes as many steps as our run.

    Its train_num_samples is known; `sizes` are samples of the shards. At most `config.workers`:
    the peer deals whole shards to the processes, rounds the batches of an epoch up to a multiple
    of them, and a process with fewer samples than a batch waits for ever (open_clip_train 3.3.0,
    data.py, get_wds_dataset).

    Raises:
        ValueError: the shards are too few or too small for that many workers.
    """
    assert config.train_data is not None and config.train_num_samples is not None
    shards = len(expand_shards(config.train_data))
    batches = math.ceil(config.train_num_samples / (config.batch_size * workers))
    for number in range(config.workers, -1, -1):
        processes = max(number, 1) * workers
        fewest = sum(sorted(sizes)[: shards // processes]) if sizes else config.batch_size
        if shards >= processes and fewest >= config.batch_size and batches % max(number, 1) == 0:
            return number
    raise ValueError(
        f"{PEER} deals whole shards to its workers, and {shards} shards do not give each of "
        f"{workers} workers a batch of {config.batch_size}. Write train_data as more shards"
    )


def command(config: Config, *, workers: int) -> list[str]:
    """The peer's line for this configuration as it stands, every value resolved.

    Raises:
        ValueError: a field of our own makes this run something that the peer cannot do.
    """
    _refuse_unlike(config)
    if beyond := _beyond_flags(config):
        raise ValueError(
            f"{PEER} has no flag for {' and '.join(beyond)}, but reads it in a model file: an "
            "export ships one, with the line that takes it"
        )
    # Without "--" torchrun takes the peer's --logs for an abbreviation of its own --logs-specs.
    launcher = ["torchrun", "--nproc_per_node", str(workers), "-m", "--", "open_clip_train.main"]
    return [*launcher, *_flags(config)]


def shell(arguments: Sequence[str]) -> str:
    """A command as one line that a POSIX shell reads back unchanged."""
    return shlex.join(arguments)


def own_fields() -> dict[str, tuple[Any, ...]]:
    """Fields that are no flags of the peer, each with the values under which our run is its."""
    return {
        name: mark.like_the_peer
        for name, info in Config.model_fields.items()
        for mark in info.metadata
        if isinstance(mark, Ours)
    }


def _refuse_unlike(config: Config) -> None:
    for name, same in own_fields().items():
        if same and getattr(config, name) not in same:
            raise ValueError(
                f"{name} {getattr(config, name)!r} has no equal in {PEER}; "
                f"the exported run would differ. Set {name}: {same[0]}"
            )


def _beyond_flags(config: Config) -> list[str]:
    """Fields in use that the peer reads in a model file alone."""
    start = ["logit_scale_init"] if config.logit_scale_init is not None else []
    return [*(["qk_norm"] if config.qk_norm else []), *start]


def _flags(config: Config) -> list[str]:
    ours = own_fields()
    names = [name for name in Config.model_fields if name not in ours]
    return [word for name in names for word in _flag(name, getattr(config, name))]


def _knows(model: str) -> bool:
    """Whether open_clip has a model of this name of its own; imports nothing."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        return True
    return (Path(found.origin).parent / "model_configs" / f"{model}.json").is_file()


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, Augmentation):
        given = {key: item for key, item in value if item is not None}
        return [flag, *(f"{key}={_compact(item)}" for key, item in given.items())]
    if isinstance(value, tuple):
        return [flag, *(_number(item) for item in value)]
    if isinstance(value, str):  # argparse takes a word that begins with "-" for a flag
        return [f"{flag}={value}"] if value.startswith("-") else [flag, value]
    return [flag, _number(value)]


def _number(value: float) -> str:
    """Digits that give the same number back; argparse of Python 3.11 takes -1e-05 for a flag."""
    return repr(value) if value >= 0 else format(Decimal(repr(value)), "f")


def _compact(value: Any) -> str:
    return repr(value).replace(" ", "")


def export_model(config: Config, weights: Path, folder: Path) -> None:
    """Write `folder` so that open_clip loads it as ``local-dir:FOLDER``.

    `weights` is a checkpoint's model.safetensors. The weights are copied as they are.

    Raises:
        ValueError: the tokenizer is not open_clip's own, so its files cannot be written.
    """
    import shutil

    import open_clip

    described = _describe_model(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(described, encoding="utf-8")
    shutil.copyfile(weights, folder / "open_clip_model.safetensors")
    model = open_clip.create_model(f"local-dir:{folder}", output_dict=True)
    record_features(folder, compute_probe(model))


def _describe_model(config: Config) -> str:
    """open_clip_config.json of the model that `config` trains.

    Raises:
        ValueError: the tokenizer is not open_clip's own, so its files cannot be written.
    """
    import open_clip

    model_config = describe_model(config.model, qk_norm=config.qk_norm)
    if model_config["text_cfg"].get("hf_tokenizer_name"):
        raise ValueError(f"{config.model} has a tokenizer of its own, which is not exported")
    if config.force_image_size is not None:
        model_config["vision_cfg"]["image_size"] = config.force_image_size
    if config.force_context_length is not None:
        model_config["text_cfg"]["context_length"] = config.force_context_length
    if config.force_quick_gelu:
        model_config["quick_gelu"] = True
    if config.force_custom_text:
        model_config["custom_text"] = True
    if config.siglip:
        model_config["init_logit_bias"] = -10
    if config.logit_scale_init is not None:
        model_config["init_logit_scale"] = math.log(config.logit_scale_init)
    preprocess = {
        "mean": config.image_mean or open_clip.OPENAI_DATASET_MEAN,
        "std": config.image_std or open_clip.OPENAI_DATASET_STD,
        "interpolation": config.image_interpolation or "bicubic",
        "resize_mode": config.image_resize_mode or "shortest",
    }
    content = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    return json.dumps(content, indent=2) + "\n"


def check_model(folder: str) -> str:
    """Load an exported folder by open_clip's public call alone; what was found, in a sentence.

    Raises:
        LoadError: the model does not give the features that were recorded with it.
    """
    import open_clip

    place = Path(folder).resolve()
    model, _, _ = open_clip.create_model_and_transforms(
        f"local-dir:{place}", output_dict=True, require_pretrained=True
    )
    open_clip.get_tokenizer(f"local-dir:{place}")
    return check_features(place, compute_probe(model), loader="open_clip")
