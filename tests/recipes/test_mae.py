"""Masked autoencoders: the peer's flags, rates, weights and groups; one run from plan to export."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_data import make_pictures

from ablate.recipes.mae.groups import count_decayed_vectors, make_groups
from ablate.recipes.mae.learner import rate_at
from ablate.recipes.mae.model import create_model, encode, loss_of_nothing
from ablate.testing import EvaluationContract, RecipeContract
from ablate.training.ranks import Gang
from ablate.trial.recipe import absolute, load

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "model": "tiny",
    "input_size": 32,
    "precision": "fp32",
    "num_workers": 0,
    "batch_size": 16,
    "lr": 1e-3,
    "epochs": 1,
    "warmup_epochs": 0,
    "norm_pix_loss": True,
    "data_path": "train",
    "val_path": "val",
    "evaluations": [{"kind": "reconstruction"}],
}


def config(**changes: Any) -> Any:
    return load("mae").Config(**{**TINY, **changes})


class TestMae(RecipeContract):
    name = "mae"
    objective = "recon_gap"
    fields = TINY

    def root(self, tmp_path: Path) -> Path:
        data = tmp_path / "data"
        return data if data.exists() else make_pictures(data)


class TestReconstruction(EvaluationContract):
    measures = ("recon_loss", "recon_gap", "recon_loss_worst")

    def evaluated(self, tmp_path: Path) -> tuple[Any, torch.nn.Module]:
        placed = absolute(config(), root=make_pictures(tmp_path / "data").resolve())
        task = load("mae").build(placed, gang=Gang(0, 1, 0, 1, CPU))  # type: ignore[attr-defined]
        return task.evaluations[0], task.learner.model


def test_the_model_begins_as_the_peers() -> None:
    """Positions are sines of columns, then of rows; tokens have deviation 0.02; queries, keys and
    values are bounded as the one layer that they are there; the seed decides all of it."""
    model: Any = create_model(config(), CPU)
    positions = model.vit.embeddings.position_embeddings
    omega = 1 / 10000 ** (np.arange(24) / 24)
    column, row = 3, 2
    expected = np.concatenate(
        [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
    )
    found = positions[0, 1 + row * 4 + column].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not positions[0, 0].any() and float(model.decoder.decoder_pos_embed.std()) > 0.4
    assert 0.01 < float(model.vit.embeddings.cls_token.detach().std()) < 0.03
    query = model.vit.layers[0].attention.q_proj.weight
    assert 0.98 < float(query.detach().abs().max()) / math.sqrt(6 / (96 + 3 * 96)) <= 1
    again = create_model(config(), CPU).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    other = create_model(config(seed=1), CPU).state_dict()
    assert not torch.equal(query, other["vit.layers.0.attention.q_proj.weight"])


def test_the_library_alone_gives_no_positions() -> None:
    """What transformers constructs has positions of zero: the encoder's output then ignores where
    patches stand, and the plan says that this is no way to train."""
    shuffled = torch.randperm(16)
    pixels = torch.randn(2, 3, 32, 32)
    tiles = pixels.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 3, 8, 8)
    moved = tiles[:, shuffled].reshape(2, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5)
    blind = config(init="transformers")
    for setting, same in ((blind, True), (config(), False)):
        model = create_model(setting, CPU).eval()
        one, other = (encode(model, p) for p in (pixels, moved.reshape(2, 3, 32, 32)))
        assert torch.allclose(one, other, atol=1e-5) is same
    assert load("mae").unsound(blind, workers=1) and not load("mae").unsound(config(), workers=1)


@pytest.mark.parametrize(
    ("rule", "decayed", "vectors"),
    [
        ("mae", 41, 0),
        ("timm", 40, 0),
        ("renamed_positional", 108, 67),
        ("all", 108, 67),
        ("none", 0, 0),
    ],
)
def test_rules_decay_what_their_code_decays(rule: str, decayed: int, vectors: int) -> None:
    """Every trainable tensor is in one group; the old call with the new name decays them all."""
    model = create_model(config(param_groups=rule), CPU)
    groups = make_groups(config(param_groups=rule), model)
    members = [p for group in groups for p in group["params"]]
    assert {id(p) for p in members} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(members) == 108
    assert sum(len(g["params"]) for g in groups if g["weight_decay"]) == decayed
    assert count_decayed_vectors(groups) == vectors


def test_loss_of_nothing_is_one_for_each_patch_that_is_not_flat() -> None:
    """Of normalised patches a textured one costs 1 and a flat one nothing."""
    model = create_model(config(), CPU)
    pixels = torch.randn(1, 3, 32, 32)
    assert float(loss_of_nothing(model, pixels)) == pytest.approx(191 / 192, abs=1e-3)
    pixels[:, :, :16] = 0.3
    assert float(loss_of_nothing(model, pixels)) == pytest.approx(191 / 384, abs=1e-3)


def test_rates_follow_the_peers_formula() -> None:
    """Up from 0 over the warmup, then half a cosine to min_lr, by fractional epochs."""
    setting = config(epochs=40, warmup_epochs=4, min_lr=1e-5)
    found = [rate_at(setting, epoch, peak=1e-3) for epoch in (0, 1, 4, 22, 40)]
    assert found == pytest.approx([0, 2.5e-4, 1e-3, 1e-5 + 0.5 * 9.9e-4, 1e-5])


def test_the_line_is_the_peers() -> None:
    """Its parser's flags (main_pretrain.py) take the line, with the values of the setting."""
    setting = load("mae").Config(data_path="/data/imagenet/train", norm_pix_loss=True, blr=1.5e-4)
    line = load("mae").command(setting, workers=8)
    assert line[:4] == ["torchrun", "--nproc_per_node", "8", "main_pretrain.py"]
    parser = argparse.ArgumentParser()
    for name, kind in {
        "batch_size": int, "epochs": int, "accum_iter": int, "model": str, "input_size": int,
        "mask_ratio": float, "weight_decay": float, "lr": float, "blr": float, "min_lr": float,
        "warmup_epochs": int, "data_path": str, "seed": int, "num_workers": int,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--norm_pix_loss", action="store_true")
    read = vars(parser.parse_args(line[4:]))
    assert read.pop("data_path") == "/data/imagenet" and read.pop("lr") is None
    assert read == {name: getattr(setting, name) for name in read}
    for other in ({"param_groups": "all"}, {"data_path": "/data/imagenet/val"}):
        with pytest.raises(ValueError, match="Set param_groups: mae|Name the folder train"):
            load("mae").command(setting.model_copy(update=other), workers=8)


def test_a_missing_library_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outline, which check and plan ask for, names the library and the extra."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers.*pip install 'ablate-runner\[ssl\]'"):
        load("mae").outline(config(), workers=1, gpus=0, root=Path("/"))


def test_the_plan_counts_what_is_decayed(tmp_path: Path) -> None:
    """A rule that decays LayerNorms and biases is warned of, with how many; the peer's is not."""
    root = make_pictures(tmp_path / "data")
    for rule, told in (("mae", False), ("renamed_positional", True)):
        found = load("mae").outline(
            config(param_groups=rule), workers=1, gpus=0, root=root, deep=True
        )
        assert any("67 tensors of one dimension" in text for text in found.warnings) is told
        decayed = found.notes[0].facts["decay"]["tensors"]
        assert found.steps == 3 and decayed == (108 if told else 41)


def test_an_exported_model_is_what_transformers_loads(tmp_path: Path) -> None:
    """from_pretrained gives the features that were recorded, positions and all."""
    import safetensors.torch

    model = create_model(config(seed=3), CPU)
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), weights)
    load("mae").export_model(config(seed=3), weights, tmp_path / "model")
    assert "features are those" in load("mae").check_model(str(tmp_path / "model"))
