"""SwAV: the peer's flags, rates, LARC and queue; assignments that are balanced, or not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_data import make_pictures

from ablate.recipes.swav.crops import make_views
from ablate.recipes.swav.learner import Swapped, make_optimizer, measure, rate_at
from ablate.recipes.swav.model import SwAV, create_model, make_input
from ablate.testing import RecipeContract
from ablate.training.data.augment import sample_seeds
from ablate.training.data.picture_files import open_pictures
from ablate.training.data.pictures import Pictures
from ablate.training.ranks import Gang
from ablate.trial.recipe import load

CPU = torch.device("cpu")
ALONE = Gang(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)
TINY: dict[str, Any] = {
    "arch": "tiny",
    "nmb_crops": [2, 1],
    "size_crops": [24, 16],
    "min_scale_crops": [0.14, 0.05],
    "max_scale_crops": [1.0, 0.14],
    "hidden_mlp": 32,
    "feat_dim": 16,
    "nmb_prototypes": 12,
    "use_fp16": False,
    "sync_bn": "none",
    "workers": 0,
    "batch_size": 16,
    "base_lr": 0.3,
    "epochs": 1,
    "warmup_epochs": 0,
    "freeze_prototypes_niters": 1,
    "optimizer": "sgd",
    "queue_length": 32,
    "epoch_queue_starts": 0,
    "data_path": "train",
    "val_path": "val",
    "evaluations": [{"kind": "knn", "train_path": "train"}],
    "seed": 0,
}


def config(**changes: Any) -> Any:
    return load("swav").Config(**{**TINY, **changes})


class TestSwav(RecipeContract):
    name = "swav"
    objective = "knn_top1"
    fields = TINY

    def root(self, tmp_path: Path) -> Path:
        data = tmp_path / "data"
        return data if data.exists() else make_pictures(data)


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, ...]:
    """Three crops of sixteen drawn shapes."""
    root = make_pictures(tmp_path_factory.mktemp("swav") / "data")
    pictures = Pictures(open_pictures(str(root / "train")), views=make_views(config()))
    ids = np.arange(0, 48, 3)
    tensors, bad = pictures.batch(ids, sample_seeds(1, 0, ids))
    assert not bad.any()
    return tensors


def learner(**changes: Any) -> Swapped:
    setting = config(**changes)
    model = create_model(setting, CPU)
    return Swapped(setting, model, gang=ALONE, steps_per_epoch=4, to_input=make_input(CPU))


def take(mine: Swapped, step: int, crops: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """One step on these crops."""
    mine.rates(step)
    mine.optimizer.zero_grad()
    values = mine.loss(mine.model, [crops], lambda loss: loss.backward())
    mine.optimizer.step()
    mine.settle()
    return {name: float(value) for name, value in values.items()}


def test_crops_have_their_sizes_and_colours(crops: tuple[torch.Tensor, ...]) -> None:
    """Two large crops that differ, one small; each N x S x S x 3 bytes."""
    assert [tuple(crop.shape) for crop in crops] == [(16, 24, 24, 3)] * 2 + [(16, 16, 16, 3)]
    assert not torch.equal(crops[0], crops[1]) and crops[0].dtype is torch.uint8


def test_prototypes_are_frozen_first_and_have_norm_one(crops: tuple[torch.Tensor, ...]) -> None:
    """In the first steps they stay as they are, later they move; before a step their norm is 1."""
    mine = learner(freeze_prototypes_niters=2)
    seen = []
    for step in range(3):
        take(mine, step, crops)
        seen.append(mine.model.prototypes.weight.detach().clone())
    assert torch.allclose(seen[0], seen[1], atol=1e-6)
    assert not torch.allclose(seen[1], seen[2], atol=1e-4)
    assert torch.allclose(seen[0].norm(dim=1), torch.ones(12), atol=1e-6)


def test_it_says_which_parameters_are_frozen_on_purpose(crops: tuple[torch.Tensor, ...]) -> None:
    """Exactly those that a step leaves without a gradient; later none."""
    mine = learner(freeze_prototypes_niters=1)
    for step in range(2):
        take(mine, step, crops)
        without = [name for name, p in mine.model.named_parameters() if p.grad is None]
        assert without == list(mine.frozen(step)) == (["prototypes.weight"] if step == 0 else [])


def test_the_queue_is_used_once_it_is_full(crops: tuple[torch.Tensor, ...]) -> None:
    """Newest first, by crop; two batches fill it, and only then it changes what is learnt."""
    mine, without = learner(), learner(queue_length=0)
    assert mine.model.queue.shape == (2, 32, 16)
    one, other = take(mine, 0, crops)["loss"], take(without, 0, crops)["loss"]
    first = mine.model.queue[:, :16].clone()
    assert one == other and not mine.model.queue[:, 16:].any()
    assert take(mine, 1, crops)["loss"] == take(without, 1, crops)["loss"]
    assert mine.model.queue_is_full and torch.equal(mine.model.queue[:, 16:], first)
    assert take(mine, 2, crops)["loss"] != take(without, 2, crops)["loss"]


def test_larc_is_the_peers() -> None:
    """The step of apex' LARC without clipping around SGD: gradient and decay times
    0.001 |w| / (|g| + wd |w| + 1e-8), then momentum; a tensor of zeros is stepped plainly."""
    setting = config(optimizer="larc", wd=1e-2)
    model = create_model(setting, CPU)
    optimizer = make_optimizer(setting, model)
    expected, buffers = {}, {}
    torch.manual_seed(0)
    for round_ in range(2):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            w = expected.get(name, p.detach().clone())
            g = p.grad.clone()
            if w.norm() and g.norm():
                rate = 1e-3 * w.norm() / (g.norm() + 1e-2 * w.norm() + 1e-8)
                g = (g + 1e-2 * w) * rate
            buffers[name] = g if round_ == 0 else 0.9 * buffers[name] + g
            expected[name] = w - 0.3 * buffers[name]
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, expected[name], atol=1e-6), name


def test_rates_follow_the_peers_arrays() -> None:
    """numpy.linspace over the warmup, then half a cosine over the rest, step by step."""
    setting = config(epochs=5, warmup_epochs=2, start_warmup=0.1, base_lr=0.6, final_lr=0.06)
    warm = np.linspace(0.1, 0.6, 8)
    rest = np.arange(12)
    cosine = 0.06 + 0.5 * (0.6 - 0.06) * (1 + np.cos(np.pi * rest / 12))
    found = [rate_at(setting, step, 4) for step in range(20)]
    assert found == pytest.approx(np.concatenate([warm, cosine]).tolist())


def test_what_is_measured_tells_collapse_from_evenness() -> None:
    """All samples at one prototype use one; even predictions use all; one point has no spread."""
    point = torch.nn.functional.one_hot(torch.zeros(64, dtype=torch.long), 16).float()
    scores = torch.zeros(64, 12)
    scores[:, 3] = 1.0
    found = measure(point, scores, 0.01)
    assert found["prototype_perplexity"] < 1.01 and found["prototypes_used"] == 1
    assert found["projection_spread"] == 0
    even = torch.nn.functional.one_hot(torch.arange(64) % 16, 16).float()
    spread = torch.nn.functional.one_hot(torch.arange(60) % 12, 12).float()
    found = measure(even[:60], spread, 0.01)
    assert found["prototypes_used"] == 12 and found["prototype_perplexity"] > 11.9
    assert found["projection_spread"] > 0.9


def test_a_gang_that_lacks_workers_is_not_made_up_for(tmp_path: Path) -> None:
    """Fewer ranks would balance other batches: refused, with what to do."""
    with pytest.raises(ValueError, match="balances the assignments of 4 workers"):
        load("swav").share_out(config(), workers=4, ranks=2, root=tmp_path)


def test_the_line_is_the_peers() -> None:
    """The flags of main_swav.py take the line of its 200-epoch script for a batch of 256."""
    setting = load("swav").Config(
        data_path="/data/imagenet/train", nmb_crops=[2, 6], size_crops=[224, 96],
        min_scale_crops=[0.14, 0.05], max_scale_crops=[1.0, 0.14], queue_length=3840, epochs=200,
        base_lr=0.6, final_lr=0.0006, freeze_prototypes_niters=5005, warmup_epochs=0,
    )  # fmt: skip
    line = load("swav").command(setting, workers=4)
    assert line[:4] == ["torchrun", "--nproc_per_node", "4", "main_swav.py"]
    parser = argparse.ArgumentParser()
    for name, kind in {
        "nmb_crops": int, "size_crops": int, "min_scale_crops": float, "max_scale_crops": float,
        "crops_for_assign": int,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, nargs="+")
    for name, kind in {
        "data_path": str, "temperature": float, "epsilon": float, "sinkhorn_iterations": int,
        "feat_dim": int, "nmb_prototypes": int, "queue_length": int, "epoch_queue_starts": int,
        "epochs": int, "batch_size": int, "base_lr": float, "final_lr": float,
        "freeze_prototypes_niters": int, "wd": float, "warmup_epochs": int, "start_warmup": float,
        "arch": str, "hidden_mlp": int, "workers": int, "sync_bn": str, "seed": int,
        "use_fp16": str,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    read = vars(parser.parse_args(line[4:]))
    assert read.pop("use_fp16") == "true"
    for name, value in read.items():
        field = getattr(setting, name)
        assert value == (list(field) if isinstance(field, tuple) else field), name
    with pytest.raises(ValueError, match="Set sinkhorn_scope: global"):
        load("swav").command(setting.model_copy(update={"sinkhorn_scope": "local"}), workers=4)


def test_a_missing_library_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outline, which check and plan ask for, names the library and the extra."""
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(ValueError, match=r"needs lightly.*pip install 'ablate-runner\[ssl\]'"):
        load("swav").outline(config(), workers=1, gpus=0, root=Path("/"))


def test_an_exported_backbone_loads_into_its_architecture(tmp_path: Path) -> None:
    """torchvision's names, whole; projection and prototypes lie apart."""
    import safetensors.torch

    setting = config(arch="resnet18", hidden_mlp=0)
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file(SwAV(setting, workers=1).state_dict(), weights)
    load("swav").export_model(setting, weights, tmp_path / "model")
    assert "resnet18 takes all" in load("swav").check_model(str(tmp_path / "model"))
