"""The openclip recipe: its Config against the peer's own parser, plan-time checks, export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from small_trials import CLASSES, config, fields, make_data

from ablate.errors import DataError
from ablate.recipes import openclip
from ablate.trial.recipe import absolute, load

NOT_IN_COMMAND = set(openclip.own_fields())


def peer_arguments(arguments: list[str]) -> dict[str, Any]:
    """What open_clip_train's own parser makes of a command line."""
    pytest.importorskip("open_clip_train")
    from open_clip_train.params import parse_args

    parsed = dict(vars(parse_args(arguments)))
    if isinstance(parsed["force_image_size"], list) and len(parsed["force_image_size"]) == 1:
        parsed["force_image_size"] = parsed["force_image_size"][0]  # as the peer's main() does
    return parsed


def plain(value: Any) -> Any:
    """A value as the parser gives it: no unset augmentation keys, sequences as lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_importing_a_recipe_imports_no_torch() -> None:
    """Plans are made on machines without a GPU stack."""
    code = (
        "import sys\nfrom ablate.trial.recipe import load, names\n"
        "for name in names(): load(name)\n"
        "bad = {'torch', 'open_clip', 'ray', 'optuna', 'mlflow'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_field_is_a_flag_of_the_peer() -> None:
    """A Config field is a flag of open_clip_train 3.3.0 or stands in own_fields."""
    flags = set(peer_arguments([]))
    ours = set(openclip.Config.model_fields)
    assert ours - flags == set(openclip.own_fields())
    assert not flags & set(openclip.own_fields())


def test_every_field_says_what_it_means() -> None:
    """Each field has a description, which editors show."""
    for model in (openclip.Config, openclip.Augmentation):
        assert [n for n, f in model.model_fields.items() if not f.description] == []


@pytest.mark.parametrize("model", ["RN50", "ViT-B-32", "tiny-rn-a"])
def test_defaults_are_the_peers(model: str) -> None:
    """A Config that only names the model resolves to what the peer's parser resolves to."""
    theirs = peer_arguments(["--model", model])
    ours = openclip.Config(model=model).model_dump(mode="json")
    different = {
        name: (value, theirs[name])
        for name, value in ours.items()
        if name not in NOT_IN_COMMAND and plain(value) != plain(theirs[name])
    }
    # Ours are written out where the peer decides later: the kind of data, the augmentation.
    assert set(different) == {"dataset_type", "aug_cfg"}
    assert ours["dataset_type"] == "webdataset"


@pytest.mark.parametrize(
    ("given", "fast"),
    [
        ({}, {"fused", "channels_last", "fast_resize"}),
        ({"speed": "exact"}, set()),
        ({"channels_last": False}, {"fused", "fast_resize"}),
        ({"opt": "timm/lamb", "lr": 1e-3}, {"channels_last", "fast_resize"}),
        ({"aug_cfg": {"use_timm": True}}, {"fused", "channels_last"}),
    ],
)
def test_fast_is_what_rounds_otherwise_wherever_it_applies(
    given: dict[str, Any], fast: set[str]
) -> None:
    """One field says it, each of the three may say otherwise, and what was resolved stays so."""
    resolved = openclip.Config(**given)
    assert {name for name in openclip.config.FAST if getattr(resolved, name)} == fast
    assert openclip.Config(**resolved.model_dump(mode="json")) == resolved


def test_exact_and_a_fast_setting_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="fused rounds otherwise; remove one of the two"):
        openclip.Config(speed="exact", fused=True)


def test_the_peers_line_says_what_of_it_rounds_otherwise(data: Path) -> None:
    """A fast trial's line names the settings that the peer has no flag for; an exact one's not."""
    notes = {
        speed: " ".join(
            openclip.upstream(
                openclip.Config(
                    model="RN50", train_data="x.tar", train_num_samples=64, speed=speed
                ),
                workers=1,
                root=data,
            ).notes
        )
        for speed in ("exact", "fast")
    }
    assert "fused, channels_last, fast_resize: the same formulas" in notes["fast"]
    assert "the same formulas" not in notes["exact"]


COMMANDS: dict[str, dict[str, Any]] = {
    "small": {},
    "flags": {
        "local_loss": True, "gather_with_grad": True, "use_bn_sync": True, "accum_freq": 2,
        "grad_clip_norm": 1.0, "grad_checkpointing": True, "skip_scheduler": True,
        "train_num_samples": 2905954, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25] * 3,
        "force_image_size": 64, "torchcompile": True, "ddp_static_graph": True,
        "lock_text": True, "lock_text_unlocked_layers": 1, "force_patch_dropout": 0.25,
    },
    "vit": {"model": "ViT-B-32", "beta2": None, "eps": None, "precision": "amp_bfloat16"},
    "siglip": {"siglip": True, "loss_dist_impl": "gather"},
    "timm": {"opt": "timm/lamb", "beta2": None, "eps": None, "momentum": None},
    "cooldown": {
        "lr_scheduler": "const-cooldown", "epochs_cooldown": 1, "lr_cooldown_end": 1e-6,
        "lr_cooldown_power": 2.0,
    },
    "timm augmentation": {
        "aug_cfg": {"use_timm": True, "scale": [0.4, 1.0], "ratio": [0.75, 1.5], "re_prob": 0.3}
    },
    "colour": {
        "aug_cfg": {
            "color_jitter": [0.4, 0.4, 0.4, 0.1], "color_jitter_prob": 0.8, "gray_scale_prob": 0.2
        }
    },
    "negative numbers": {"image_mean": [-1e-5, -2.5, 1e-7], "train_data": "-s/{0..9}.tar"},
    "odd path": {"train_data": "a b/{000..010}.tar::c'd/{x,y}.tar", "imagenet_val": "v al"},
}  # fmt: skip


@pytest.mark.parametrize("changes", COMMANDS.values(), ids=COMMANDS.keys())
def test_the_exported_command_parses_back_to_equal_values(changes: dict[str, Any]) -> None:
    """torchrun and the peer's parser give every field back as it was, also through a shell."""
    import shlex

    from torch.distributed.run import get_args_parser

    chosen = config(**changes)
    line = openclip.shell(openclip.command(chosen, workers=8))
    launcher = get_args_parser().parse_args(shlex.split(line)[1:])
    assert launcher.nproc_per_node == "8" and launcher.module
    assert launcher.training_script == "open_clip_train.main"
    theirs = peer_arguments(launcher.training_script_args)
    for name, value in chosen.model_dump(mode="json").items():
        if name not in NOT_IN_COMMAND:
            assert plain(theirs[name]) == plain(value), name


@pytest.mark.parametrize(
    ("name", "value"), [("init_from", {"path": "w.safetensors"}), ("param_groups", "timm")]
)
def test_a_command_that_would_differ_is_not_exported(name: str, value: Any) -> None:
    """Fields of our own that change the run cannot be exported as the peer's command."""
    with pytest.raises(ValueError, match=name):
        openclip.command(config(**{name: value}), workers=1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # it is never iterated
@settings(max_examples=150)
@given(
    num_samples=st.integers(1, 400),
    batch_size=st.integers(1, 40),
    workers=st.integers(1, 4),
    loaders=st.integers(0, 5),
    shards=st.integers(1, 12),
    accum_freq=st.integers(1, 3),
)
def test_the_exported_line_takes_as_many_steps(
    num_samples: int, batch_size: int, workers: int, loaders: int, shards: int, accum_freq: int
) -> None:
    """The peer's own pipeline, given the exported line, has as many steps an epoch as our run; or
    there is no line, because the peer needs a shard for each worker."""
    pytest.importorskip("open_clip_train")
    from open_clip_train.data import get_wds_dataset

    chosen = config(
        train_data=f"s/{{0..{shards - 1}}}.tar", train_num_samples=num_samples, workers=loaders,
        batch_size=batch_size, accum_freq=accum_freq, epochs=3,
    )  # fmt: skip
    if shards < workers:
        with pytest.raises(ValueError, match="more shards"):
            openclip.upstream(chosen, workers=workers, root=Path("/none"))
        return
    upstream = openclip.upstream(chosen, workers=workers, root=Path("/none"))
    theirs = peer_arguments([str(word) for word in upstream.arguments])
    assert theirs["workers"] <= loaders
    assert bool(upstream.notes) == (theirs["workers"] != loaders)
    dealt = get_wds_dataset(
        SimpleNamespace(**theirs, world_size=workers), None, is_train=True, tokenizer=None
    )
    steps = dealt.dataloader.num_batches // accum_freq * 3
    assert steps == openclip.num_steps(chosen, workers=workers, num_samples=num_samples)


def test_the_exported_line_gives_what_the_trial_knew(tmp_path: Path) -> None:
    """Samples that were counted are written out, from the shards or else from the steps taken;
    shards too small to give each process a batch are refused; what was left out is said."""
    pytest.importorskip("open_clip_train")
    data = make_data(tmp_path)
    chosen = config(workers=4)
    upstream = openclip.upstream(chosen, workers=1, root=data, faults={"missing_caption": 3})
    theirs = peer_arguments([str(word) for word in upstream.arguments])
    assert (theirs["train_num_samples"], theirs["workers"]) == (96, 3)
    assert "3 x missing_caption" in upstream.notes[-1]
    assert theirs["imagenet_val"] is None and upstream.measured == {}, "classes of its own"
    away = openclip.upstream(chosen, workers=1, root=tmp_path / "no", steps=12)
    theirs = peer_arguments([str(word) for word in away.arguments])
    assert theirs["train_num_samples"] == 96
    assert (theirs["imagenet_val"], list(away.measured)[0]) == ("val", "imagenet_top1")
    with pytest.raises(ValueError, match="train_num_samples"):
        openclip.upstream(chosen, workers=1, root=tmp_path / "no")
    with pytest.raises(ValueError, match="a batch of 40"):
        openclip.upstream(config(batch_size=40), workers=3, root=data)


REFUSED = {
    "no timm": ({"aug_cfg": {"scale": [0.4, 1.0], "re_prob": 0.3}}, "use_timm: true"),
    "no timm ratio": ({"aug_cfg": {"ratio": [0.5, 2]}}, "use_timm: true"),
    "jitter without probability": (
        {"aug_cfg": {"color_jitter": [0.4, 0.4, 0.4, 0.1]}},
        "color_jitter_prob",
    ),
    "jitter of one number": (
        {"aug_cfg": {"color_jitter": 0.4, "color_jitter_prob": 0.8}},
        "four numbers",
    ),
    "timm drops grey": ({"aug_cfg": {"use_timm": True, "gray_scale_prob": 0.2}}, "silently"),
    "count without erasing": ({"aug_cfg": {"use_timm": True, "re_count": 2}}, "re_prob"),
    "unknown key": ({"aug_cfg": {"scales": [0.4, 1.0]}}, "scales"),
    "empty scale": ({"aug_cfg": {"scale": [0.9, 0.4]}}, "smaller share first"),
    "no clipping is empty": ({"grad_clip_norm": 0.0}, "greater than 0"),
    "momentum of adamw": ({"momentum": 0.9}, "timm/sgd"),
    "cooldown without epochs": ({"lr_scheduler": "const-cooldown"}, "epochs_cooldown"),
    "cooldown without schedule": ({"epochs_cooldown": 1}, "const-cooldown"),
    "local loss of siglip": ({"siglip": True, "local_loss": True}, "does nothing with siglip"),
    "unlock without lock": ({"lock_text_unlocked_layers": 2}, "lock_text: true"),
    "csv": ({"train_data": "pairs.csv"}, "WebDataset"),
    "no lr": ({"opt": "timm/lamb", "beta2": None, "lr": None}, "no default learning rate; give lr"),
    "one beta": ({"opt": "timm/lamb", "beta1": 0.9, "beta2": None}, "both betas"),
    "nan": ({"lr": float("nan")}, "lr"),
    "precision": ({"precision": "fp8"}, "amp_bf16"),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_contradictions_are_refused(changes: dict[str, Any], says: str) -> None:
    """What the peer would silently ignore or crash on is refused, with what to change."""
    with pytest.raises(ValidationError, match=says):
        config(**changes)


def test_impossible_combinations_are_refused_with_the_reason() -> None:
    """SyncBatchNorm on CPUs is refused at plan time; with one worker it is only useless."""
    with pytest.raises(ValueError, match="no CPU kernel.*gpus_per_worker"):
        openclip.check(config(use_bn_sync=True), workers=2, gpus=0)
    assert openclip.check(config(use_bn_sync=True), workers=2, gpus=1) == []
    assert "does nothing" in openclip.check(config(use_bn_sync=True), workers=1, gpus=0)[0]
    lock = config(model="RN50", lock_text=True)
    with pytest.raises(ValueError, match="RN50 cannot be locked without.*freeze_layer_norm: true"):
        openclip.check(lock, workers=1, gpus=0)
    lock = config(model="RN50", lock_image=True, lock_image_unlocked_groups=1)
    with pytest.raises(ValueError, match="only be locked whole"):
        openclip.check(lock, workers=1, gpus=0)
    lock = config(model="ViT-B-32", lock_image=True, lock_image_unlocked_groups=1)
    openclip.check(lock, workers=1, gpus=0)
    lock = config(model="roberta-ViT-B-32", lock_text=True, lock_text_unlocked_layers=1)
    openclip.check(lock, workers=1, gpus=0)
    with pytest.raises(ValueError, match="train_data is missing"):
        openclip.check(config(train_data=None), workers=1, gpus=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "amp"}, "fp16 autocast"),
        ({"precision": "amp_bf16"}, "no bf16 instructions"),
        ({"precision": "pure_fp16", "eps": 1e-8}, "eps 1e-08"),
        ({"local_loss": True}, "negative control"),
    ],
)
def test_doubtful_settings_are_warned_about(changes: dict[str, Any], says: str) -> None:
    """Plans say what will probably not do what was meant."""
    warnings = openclip.check(config(**changes), workers=2, gpus=0)
    assert any(says in warning for warning in warnings)


def test_the_same_experiment_has_the_same_dump() -> None:
    """Defaults written out and left out resolve to one configuration, and survive JSON."""
    short = openclip.Config(model="RN50", train_data="x.tar")
    long = openclip.Config(
        model="RN50", train_data="x.tar", beta2=0.999, dataset_type="webdataset",
        aug_cfg={"scale": [0.9, 1.0]}, precision="amp",
    )  # fmt: skip
    assert short.model_dump(mode="json") == long.model_dump(mode="json")
    text = json.dumps(short.model_dump(mode="json"))
    assert openclip.Config(**json.loads(text)) == short


@pytest.mark.parametrize(
    ("num_samples", "changes", "workers", "steps"),
    [
        (5824, {"batch_size": 128, "epochs": 12}, 1, 552),  # 45.5 batches -> 46
        (5824, {"batch_size": 64, "epochs": 1, "accum_freq": 4}, 2, 11),  # 46 // 4
        (128, {"batch_size": 64, "epochs": 3}, 2, 3),
    ],
)
def test_steps_are_counted_as_the_peer_counts(
    num_samples: int, changes: dict[str, Any], workers: int, steps: int
) -> None:
    """Batches of an epoch are rounded up, then divided by accum_freq and rounded down."""
    assert openclip.num_steps(config(**changes), workers=workers, num_samples=num_samples) == steps


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup": 5},
        {"warmup": 0},
        {"warmup": 100},
        {"lr_scheduler": "const", "warmup": 3},
        {
            "lr_scheduler": "const-cooldown", "epochs_cooldown": 2, "lr_cooldown_power": 2.0,
            "lr_cooldown_end": 1e-5,
        },
    ],
)  # fmt: skip
def test_schedules_are_the_peers(changes: dict[str, Any]) -> None:
    """Every step's learning rate is the float that open_clip_train.scheduler sets."""
    import torch
    from open_clip_train import scheduler

    chosen = config(epochs=4, **changes)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=chosen.lr)
    total = 6 * chosen.epochs
    if chosen.lr_scheduler == "cosine":
        peer = scheduler.cosine_lr(optimizer, chosen.lr, chosen.warmup, total)
    elif chosen.lr_scheduler == "const":
        peer = scheduler.const_lr(optimizer, chosen.lr, chosen.warmup, total)
    else:
        peer = scheduler.const_lr_cooldown(
            optimizer, chosen.lr, chosen.warmup, total, 6 * chosen.epochs_cooldown,
            chosen.lr_cooldown_power, chosen.lr_cooldown_end,
        )  # fmt: skip
    ours = openclip.step.make_schedule(chosen, 6)
    assert [ours(step) for step in range(total)] == [peer(step) for step in range(total)]


@pytest.mark.parametrize(("use_timm", "size"), [(False, 1), (True, 4)])
def test_shared_memory_is_what_loaders_read_ahead(
    tmp_path: Path, use_timm: bool, size: int
) -> None:
    """Batches of bytes, and of floats where timm transforms them: of 8 ranks of RN50 at a batch of
    128, 4.6 GiB and 18.4."""
    chosen = config(model="RN50", workers=8, batch_size=128, aug_cfg={"use_timm": use_timm})
    found = openclip.outline(chosen, workers=8, gpus=1, root=tmp_path).shared_bytes
    assert found == 8 * 4 * 128 * 3 * 224 * 224 * size
    assert round(8 * found / 2**30, 1) == {1: 4.6, 4: 18.4}[size]


def test_chance_is_one_over_the_classes(data: Path) -> None:
    """Guessing among the class folders; without evaluation data there is no chance level."""
    assert openclip.chance(config(), root=data) == 1 / len(CLASSES)
    assert openclip.chance(config(imagenet_val=None), root=data) == 0.0
    with pytest.raises(DataError, match="no class folders"):
        openclip.chance(config(imagenet_val="nowhere"), root=data)


def test_samples_are_counted_in_the_shards(data: Path) -> None:
    """Without train_num_samples the shards say how long an epoch is."""
    assert openclip.num_samples(config(), root=data) == 96
    assert openclip.num_samples(config(train_num_samples=50), root=data) == 50
    with pytest.raises(DataError, match="missing"):
        openclip.num_samples(config(train_data="train/{00000..00009}.tar"), root=data)


def test_classes_come_with_the_folder_or_from_imagenet(tmp_path: Path, data: Path) -> None:
    """classnames.json and templates.json of the folder count; else it must have 1000 classes."""
    names, templates = openclip.zero_shot_classes(data / "val")
    assert names == list(CLASSES) and templates == ["a {}", "{} on grey"]
    for number in range(5):
        (tmp_path / f"n{number:08d}").mkdir()
    with pytest.raises(DataError, match="5 classes and no classnames.json"):
        openclip.zero_shot_classes(tmp_path)
    (tmp_path / "classnames.json").write_text('["a"]')
    with pytest.raises(DataError, match="templates.json is missing"):
        openclip.zero_shot_classes(tmp_path)
    (tmp_path / "templates.json").write_text('["a {}"]')
    with pytest.raises(DataError, match="names 1 classes.* has 5"):
        openclip.zero_shot_classes(tmp_path)
    for number in range(5, 1000):
        (tmp_path / f"n{number:08d}").mkdir()
    (tmp_path / "classnames.json").unlink()
    (tmp_path / "templates.json").unlink()
    assert openclip.zero_shot_classes(tmp_path) == ([], None)


def test_paths_are_relative_to_the_root() -> None:
    """Relative sources are joined with the root, each; absolute ones stay."""
    chosen = config(train_data="a/{0..2}.tar::/b/{0..2}.tar", imagenet_val="val")
    placed = absolute(chosen, root=Path("/r"))
    assert placed.train_data == "/r/a/{0..2}.tar::/b/{0..2}.tar"
    assert placed.imagenet_val == "/r/val"


def test_a_path_may_begin_with_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home of whoever launches, in every source, and never a folder below the root."""
    monkeypatch.setenv("HOME", "/home/ada")
    chosen = config(train_data="~/a.tar::b.tar", imagenet_val="~/val")
    placed = absolute(chosen, root=Path("/r"))
    assert placed.train_data == "/home/ada/a.tar::/r/b.tar"
    assert placed.imagenet_val == "/home/ada/val"


def test_an_unknown_recipe_names_those_there_are() -> None:
    """A misspelt recipe lists the recipes."""
    with pytest.raises(ValueError, match="openclip"):
        load("openclipp")


@pytest.mark.parametrize(
    "changes", [{"image_mean": None}, {}, {"siglip": True, "force_image_size": 64}]
)
def test_an_exported_model_loads_with_equal_features(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """open_clip loads the folder as local-dir and computes the same features and transform."""
    import open_clip
    import safetensors.torch
    import torch

    chosen = config(**{"image_mean": [0.4, 0.5, 0.6], **changes})
    openclip.model.register_models()
    torch.manual_seed(3)
    siglip = {"init_logit_bias": -10} if chosen.siglip else {}
    model, _, transform = open_clip.create_model_and_transforms(
        "tiny-rn-a",
        image_mean=chosen.image_mean,
        force_image_size=chosen.force_image_size,
        output_dict=True,
        **siglip,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    openclip.export_model(chosen, tmp_path / "weights.safetensors", tmp_path / "model")
    loaded, _, their_transform = open_clip.create_model_and_transforms(
        f"local-dir:{tmp_path / 'model'}", output_dict=True
    )
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")
    side = chosen.force_image_size or 32
    images, texts = torch.rand(3, 3, side, side), tokenizer(["a cat", "two dogs", ""])
    with torch.inference_mode():
        ours, theirs = model.eval()(images, texts), loaded.eval()(images, texts)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    assert torch.equal(transform(picture), their_transform(picture))


def test_small_fields_are_complete() -> None:
    """The fields that tests train with are valid as they stand."""
    assert openclip.Config(**fields()).batch_size == 16


@pytest.mark.parametrize("model", ["tiny-rn-a", "ViT-S-32-alt"])
def test_prompts_are_encoded_without_their_padding(model: str) -> None:
    """Leaving out what follows the longest prompt changes text features by rounding alone."""
    import open_clip
    import torch

    openclip.model.register_models()
    torch.manual_seed(0)
    net = open_clip.create_model(model).eval()
    texts = open_clip.get_tokenizer(model)(["a", "a photo of a red square", "the cat"])
    with torch.inference_mode():
        whole, short = (
            openclip.encode.encode_text(net, texts),
            openclip.encode.encode_prompts(net, texts),
        )
    assert texts.shape[1] > int(texts.argmax(dim=-1).max()) + 1
    assert torch.allclose(whole, short, atol=1e-6)


def test_flags_that_we_lack_are_answered_with_what_to_write() -> None:
    """Each flag of the peer is a field, or has an answer of its own; no near name is guessed."""
    flags = set(peer_arguments([]))
    ours = set(openclip.Config.model_fields)
    answered = set(openclip.Config.ELSEWHERE)
    assert flags - ours <= answered and not answered & ours
