"""Masked autoencoders fine-tuned and probed: the peer's flags, groups, LARS and weights."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from picture_data import make_pictures
from test_mae import CPU, TINY

from ablate.errors import LoadError
from ablate.recipes.mae.classifier import create_classifier
from ablate.recipes.mae.model import create_model, unmasked
from ablate.recipes.mae.supervised_learner import make_disturbance, make_optimizer
from ablate.records.folder import StudyRecord
from ablate.testing import EvaluationContract, RecipeContract
from ablate.training.ranks import Gang
from ablate.trial.recipe import absolute, load

LATER: dict[str, Any] = {
    name: value for name, value in TINY.items() if name not in ("norm_pix_loss", "evaluations")
}
LATER["evaluations"] = [{"kind": "accuracy"}]


def config(stage: str, **changes: Any) -> Any:
    return load("mae").Config(**{**LATER, "stage": stage, **changes})


class TestFinetune(RecipeContract):
    name = "mae"
    objective = "image_top1"
    fields = {**LATER, "stage": "finetune", "mixup": 0.8, "cutmix": 1.0}

    def root(self, tmp_path: Path) -> Path:
        data = tmp_path / "data"
        return data if data.exists() else make_pictures(data)


@pytest.mark.exhaustive
class TestLinprobe(TestFinetune):
    fields = {**LATER, "stage": "linprobe"}


class TestImageAccuracy(EvaluationContract):
    measures = ("image_top1", "image_top5")

    def evaluated(self, tmp_path: Path) -> tuple[Any, torch.nn.Module]:
        root = make_pictures(tmp_path / "data").resolve()
        task = load("mae").build(  # type: ignore[attr-defined]
            absolute(config("finetune"), root=root), gang=Gang(0, 1, 0, 1, CPU)
        )
        return task.evaluations[0], task.learner.model


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as a pre-training leaves them."""
    path = tmp_path_factory.mktemp("mae") / "model.safetensors"
    model = create_model(load("mae").Config(**{**TINY, "seed": 5}), CPU)
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def in_the_peers_names(path: Path) -> dict[str, torch.Tensor]:
    """What the peer's own file of this encoder holds, written out: timm's names, its decoder's."""
    stored = safetensors.torch.load_file(path)
    embeddings = "vit.embeddings."
    found = {
        "cls_token": stored[f"{embeddings}cls_token"],
        "pos_embed": stored[f"{embeddings}position_embeddings"],
        "patch_embed.proj.weight": stored[f"{embeddings}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": stored[f"{embeddings}patch_embeddings.projection.bias"],
        "norm.weight": stored["vit.layernorm.weight"],
        "norm.bias": stored["vit.layernorm.bias"],
        "mask_token": stored["decoder.mask_token"],
        "decoder_pos_embed": stored["decoder.decoder_pos_embed"],
    }
    for block in range(4):
        theirs, ours = f"vit.layers.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            parts = [stored[f"{theirs}attention.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
            for one, other in {
                "attention.o_proj": "attn.proj", "layernorm_before": "norm1",
                "layernorm_after": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
            }.items():  # fmt: skip
                found[f"{ours}{other}.{kind}"] = stored[f"{theirs}{one}.{kind}"]
    return found


def test_the_encoder_is_that_of_the_pretraining(pretrained: Path, tmp_path: Path) -> None:
    """Loaded from a trial of pretrain, or from a file in the peer's names, all tensors of the
    encoder are taken and the class token is what the pre-training's encoder makes of an image, bit
    for bit; only the head, and in finetune the norm before it, are new."""
    before: Any = create_model(load("mae").Config(**{**TINY, "seed": 5}), CPU).eval()
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad(), unmasked(before):
        noise = torch.arange(16.0).expand(3, -1)
        expected = before.vit(pixels, noise=noise).last_hidden_state
    torch.save({"model": in_the_peers_names(pretrained)}, tmp_path / "peer.pth")
    for source in ({"path": str(pretrained)}, {"path": f"{tmp_path}/peer.pth", "key": "model"}):
        model, report = create_classifier(config("linprobe", init_from=source), 4, CPU)
        assert report is not None and report.loaded_tensors == 54 and not report.at_random
        with torch.no_grad():
            assert torch.equal(model.eval().forward_features(pixels), expected)
        tuned, report = create_classifier(config("finetune", init_from=source), 4, CPU)
        assert report is not None and report.at_random == ("fc_norm.bias", "fc_norm.weight")
        for name, value in model.state_dict().items():
            if not name.startswith(("head.", "norm.")):
                assert torch.equal(tuned.state_dict()[name], value), name


def test_a_gap_in_the_weights_is_refused(pretrained: Path, tmp_path: Path) -> None:
    """A file that lacks a tensor of the encoder, or has one that nobody knows, is named."""
    stored = safetensors.torch.load_file(pretrained)
    del stored["vit.layers.2.attention.k_proj.bias"]
    safetensors.torch.save_file(stored, tmp_path / "gap.safetensors")
    for stage in ("finetune", "linprobe"):
        setting = config(stage, init_from={"path": str(tmp_path / "gap.safetensors")})
        with pytest.raises(LoadError, match=r"missing in the file: blocks\.2\.attn\.qkv\.bias"):
            load("mae").outline(setting, workers=1, gpus=0, root=tmp_path)


def test_rates_of_layers_are_the_peers(pretrained: Path) -> None:
    """Of param_groups_lrd in util/lr_decay.py: class token, positions and patches are layer 0,
    block i is layer i + 1, the rest is the last; a rate is layer_decay to the power of the layers
    above; one dimension, class token and positions are not decayed."""
    setting = config("finetune", layer_decay=0.6, weight_decay=0.07)
    model, _ = create_classifier(setting, 4, CPU)
    optimizer = make_optimizer(setting, model, lr=1.0)
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(group_of) == len(list(model.parameters())) == 56
    for name, p in model.named_parameters():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            layer = 0
        else:
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 5
        kept = p.ndim == 1 or name in ("cls_token", "pos_embed")
        group = group_of[id(p)]
        assert group["lr_scale"] == pytest.approx(0.6 ** (5 - layer)), name
        assert group["weight_decay"] == (0.0 if kept else 0.07), name
    assert len({group["name"] for group in optimizer.param_groups}) == 12


def test_lars_of_a_probe_is_the_peers() -> None:
    """util/lars.py: the head's weights are stepped by 0.001 |w| / |g + wd w| of the gradient, its
    bias plainly, both with momentum 0.9; nothing else has an optimizer."""
    setting = config("linprobe")
    model, _ = create_classifier(setting, 4, CPU)
    optimizer = make_optimizer(setting, model, lr=0.5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == ["head.1.weight", "head.1.bias"]
    expected = {name: p.detach().clone() for name, p in trained.items()}
    moved = {name: torch.zeros_like(p) for name, p in trained.items()}
    torch.manual_seed(0)
    for _ in range(3):
        for name, p in trained.items():
            p.grad = torch.randn_like(p)
            step = p.grad.clone()
            if p.ndim > 1:
                step *= 0.001 * expected[name].norm() / step.norm()
            moved[name] = 0.9 * moved[name] + step
            expected[name] = expected[name] - 0.5 * moved[name]
        optimizer.step()
    for name, p in trained.items():
        assert torch.allclose(p, expected[name], rtol=1e-5, atol=1e-7), name


def test_mixed_labels_are_smoothed_once() -> None:
    """With CutMix labels are shares that add up to 1, smoothed; without either they stay numbers;
    a probe's images stay as they are."""
    pixels, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    mixed = make_disturbance(config("finetune", cutmix=1.0, reprob=0.0), classes=4, device=CPU)
    torch.manual_seed(0)
    _, wanted = mixed(pixels.clone(), labels)
    assert torch.allclose(wanted.sum(dim=1), torch.ones(8)) and float(wanted.min()) > 0.02
    erased = make_disturbance(config("finetune", reprob=1.0), classes=4, device=CPU)
    shown, same = erased(pixels.clone(), labels)
    assert torch.equal(same, labels)
    assert all((shown[row] != pixels[row]).any() for row in range(8))
    plain = make_disturbance(config("linprobe"), classes=4, device=CPU)
    assert plain(pixels, labels)[0] is pixels


def test_each_stage_has_its_scripts_defaults() -> None:
    """Those of main_finetune.py and main_linprobe.py; what a stage does not have is refused."""
    plain = {"data_path": "/data/imagenet/train", "val_path": "/data/imagenet/val"}
    tuned, probed = (load("mae").Config(stage=s, **plain) for s in ("finetune", "linprobe"))
    names = ("batch_size", "epochs", "warmup_epochs", "blr", "min_lr", "weight_decay", "crop_scale")
    values = [tuple(getattr(each, name) for name in names) for each in (tuned, probed)]
    assert values == [
        (64, 50, 5, 1e-3, 1e-6, 0.05, (0.08, 1.0)),
        (512, 90, 10, 0.1, 0.0, 0.0, (0.08, 1.0)),
    ]
    assert tuned.betas == (0.9, 0.999)
    again = load("mae").Config(**tuned.model_dump(mode="json"))
    assert again == tuned
    for stage, wrong in (
        ("pretrain", {"layer_decay": 0.65}), ("finetune", {"mask_ratio": 0.5}),
        ("linprobe", {"drop_path": 0.2}), ("pretrain", {"evaluations": [{"kind": "accuracy"}]}),
        ("finetune", {"evaluations": [{"kind": "reconstruction"}]}),
        ("finetune", {"batch_size": 15, "mixup": 0.8}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"leave it out|has no (head|decoder)|must be even"):
            load("mae").Config(stage=stage, **plain, **wrong)


FINETUNE = {
    "batch_size": int, "epochs": int, "accum_iter": int, "model": str, "input_size": int,
    "drop_path": float, "clip_grad": float, "weight_decay": float, "lr": float, "blr": float,
    "layer_decay": float, "min_lr": float, "warmup_epochs": int, "aa": str, "smoothing": float,
    "reprob": float, "mixup": float, "cutmix": float, "finetune": str, "data_path": str,
    "seed": int, "num_workers": int,
}  # fmt: skip
LINPROBE = {
    name: FINETUNE[name]
    for name in (
        "batch_size", "epochs", "accum_iter", "model", "weight_decay", "lr", "blr", "min_lr",
        "warmup_epochs", "finetune", "data_path", "seed", "num_workers",
    )
}  # fmt: skip


@pytest.mark.parametrize(("stage", "flags"), [("finetune", FINETUNE), ("linprobe", LINPROBE)])
def test_the_line_is_the_peers(stage: str, flags: dict[str, type]) -> None:
    """The script's parser takes the line, with the values of the setting; a file that its
    torch.load would not read is refused."""
    setting = load("mae").Config(
        stage=stage, model="mae_vit_base_patch16", data_path="/data/imagenet/train",
        init_from={"path": "/weights/mae_pretrain_vit_base.pth", "key": "model"},
    )  # fmt: skip
    line = load("mae").command(setting, workers=8)
    assert line[:4] == ["torchrun", "--nproc_per_node", "8", f"main_{stage}.py"]
    parser = argparse.ArgumentParser()
    for name, kind in flags.items():
        parser.add_argument(f"--{name}", type=kind)
    read = vars(parser.parse_args(line[4:]))
    assert read.pop("model") == "vit_base_patch16" and read.pop("data_path") == "/data/imagenet"
    assert read.pop("finetune") == "/weights/mae_pretrain_vit_base.pth"
    assert {name: value for name, value in read.items() if value is not None} == {
        name: getattr(setting, name) for name, value in read.items() if value is not None
    }
    ours = setting.model_copy(update={"init_from": setting.init_from.model_copy(
        update={"path": "model.safetensors", "key": None})})  # fmt: skip
    with pytest.raises(ValueError, match="is no file as facebookresearch/mae reads it"):
        load("mae").command(ours, workers=8)


@pytest.mark.parametrize("stage", ["finetune", "linprobe"])
def test_an_exported_model_is_what_timm_loads(stage: str, tmp_path: Path) -> None:
    """create_model of the folder gives the logits of the trained model: a probe's BatchNorm is in
    its head; other weights in their place are noticed."""
    import timm

    setting = config(stage, seed=3)
    model, _ = create_classifier(setting, 4, CPU)
    with torch.no_grad():
        model.head.requires_grad_(False)
        list(model.head.parameters())[0].normal_()
        for _ in range(3):  # statistics of its own
            model(torch.randn(16, 3, 32, 32) * 2 + 1)
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file(dict(model.eval().state_dict()), weights)
    load("mae").export_model(setting, weights, tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    seen = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(again(seen), model(seen), atol=1e-5)
    assert "timm loads it" in load("mae").check_model(str(tmp_path / "out"))
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    stored["head.bias"] += 5 * torch.arange(4)
    safetensors.torch.save_file(stored, tmp_path / "out" / "model.safetensors")
    with pytest.raises(LoadError, match="features differ"):
        load("mae").check_model(str(tmp_path / "out"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", ["finetune", "linprobe"])
def test_a_study_of_a_later_stage_begins_with_a_trial_of_pretrain(
    stage: str, tmp_path: Path
) -> None:
    """`ablate train` of a pre-training, then `ablate launch` of a study whose level takes its last
    checkpoint: every tensor of the encoder comes from there, the trials are judged by their own
    head, and each leaves what its features learnt; the other level begins at random."""
    make_pictures(tmp_path / "data")
    places = {"data_path": "data/train", "val_path": "data/val"}
    before = {"recipe": "mae", "baseline": {**TINY, **places, "epochs": 2}, "seeds": [0]}
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(before))
    study = {
        "name": "later",
        "recipe": "mae",
        "baseline": {**LATER, **places, "stage": stage, "epochs": 2, "lr": 0.01},
        "factors": {
            "start": {
                "pretrained": {
                    "init_from": {"path": "runs/before/checkpoints/step-000006/model.safetensors"}
                },
                "scratch": {"init_from": None},
            }
        },
        "seeds": [0],
        "objective": {"metric": "image_top1", "margin": 0.05},
    }
    study["baseline"]["init_from"] = study["factors"]["start"]["pretrained"]["init_from"]
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(study))
    for words in (
        ["train", "before.yaml", "--out", "runs/before"],
        ["launch", "later.yaml", "--cluster", "local", "--yes"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ablate.cli", *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    trials = StudyRecord(tmp_path / "runs" / "later").records()
    found = {trial.trial()["levels"]["start"]: trial for trial in trials}
    facts = {level: (trial.result(1) or {})["facts"] for level, trial in found.items()}
    loaded = facts["pretrained"]["init_from"]
    assert loaded["loaded_tensors"] == (52 if stage == "finetune" else 54)
    assert not loaded["missing"] and "init_from" not in facts["scratch"]
    for trial in found.values():
        final = (trial.result(1) or {})["final"]
        assert 0.0 <= final["image_top1"] <= final["image_top5"] == 1.0  # of four classes
        assert (trial.learned() or {})["verdict"]
