"""Telling learning from not learning, by weights and by features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group
from small_trials import run, write_trial

from ablate.errors import CheckpointError
from ablate.recipes import openclip
from ablate.training import checkpoint, inspect


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A trial folder with checkpoints after 6 and 12 steps."""
    record = write_trial(tmp_path_factory.mktemp("inspect") / "t", data)
    assert run(record.folder) == [0]
    return record.folder


def step(folder: Path, number: int) -> Path:
    return checkpoint.path_of(folder / "checkpoints", number)


def test_a_checkpoint_does_not_differ_from_itself(trial: Path) -> None:
    """The self-difference is exactly zero, and that is what the flag says."""
    a = inspect.read_model(step(trial, 6))
    found = inspect.compare_weights(a, a)
    assert all(change.relative == 0 and change.largest == 0 for change in found.changes)
    assert found.flags == ("no change",)


def test_a_sound_run_has_no_flags(trial: Path) -> None:
    """Every parameter moved, none by more than Adam can in six steps."""
    a, b = inspect.read_model(step(trial, 6)), inspect.read_model(step(trial, 12))
    found = inspect.compare_weights(a, b, moments=checkpoint.load(step(trial, 12)).optimizer)
    assert found.flags == ()
    assert {"visual.layer1.0", "transformer.resblocks.0"} <= set(found.by_group())
    weights = [c for c in found.changes if not c.buffer]
    assert all(0 < c.largest < 6 * 1e-3 * 3 for c in weights)


def test_a_frozen_tower_is_noticed(trial: Path) -> None:
    """The image tower's parameters stand still while the others move."""
    a, b = inspect.read_model(step(trial, 6)), inspect.read_model(step(trial, 12))
    b.update({name: a[name] for name in a if name.startswith("visual.")})
    (flag,) = inspect.compare_weights(a, b).flags
    assert flag.startswith("trainable but static") and "visual.conv1" in flag


def test_what_must_not_move_is_noticed(trial: Path) -> None:
    """A tower that was to be frozen and moved."""
    a, b = inspect.read_model(step(trial, 6)), inspect.read_model(step(trial, 12))
    (flag,) = inspect.compare_weights(a, b, frozen=["transformer.*"]).flags
    assert flag.startswith("frozen but moved") and "transformer.resblocks" in flag


def test_a_stale_copy_in_the_optimizer_is_noticed(trial: Path) -> None:
    """Gradients arrive (Adam's moments are there), and the model's parameters never move."""
    a = inspect.read_model(step(trial, 6))
    moments = checkpoint.load(step(trial, 12)).optimizer
    b = {n: t + 1 if n.endswith("running_mean") else t for n, t in a.items()}
    flags = inspect.compare_weights(a, b, moments=moments).flags
    assert flags[0].startswith("only BatchNorm statistics changed")
    assert "holds another copy" in flags[1]


def test_random_and_half_loaded_weights_are_noticed(trial: Path) -> None:
    """Parameters that are a fresh initialisation to the bit, all of them or some."""
    import open_clip

    openclip._register_models()
    torch.manual_seed(0)  # the trial's seed: its own initial weights
    fresh = dict(open_clip.create_model("tiny-rn-a").state_dict())
    trained = inspect.read_model(step(trial, 12))
    everything = inspect.at_initialisation(fresh, fresh)
    assert "visual.conv1.weight" in everything and "visual.bn1.weight" not in everything
    assert inspect.at_initialisation(trained, fresh) == ()
    half = {n: fresh[n] if n.startswith("visual.") else t for n, t in trained.items()}
    found = inspect.at_initialisation(half, fresh)
    assert 0 < len(found) < len(everything) and all(n.startswith("visual.") for n in found)


def test_damaged_and_missing_checkpoints_are_errors(tmp_path: Path, trial: Path) -> None:
    """What is compared must be whole."""
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        inspect.read_model(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        inspect.read_model(tmp_path / "x.safetensors")
    assert inspect.read_config(step(trial, 6))["recipe"] == "openclip"


def clusters(spread: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """600 points around 6 centres in 24 dimensions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(6, size=600)
    centres = 3 * rng.normal(size=(6, 24)) / np.sqrt(24)
    return (centres[labels] + spread * rng.normal(size=(600, 24))).astype(np.float32), labels


def test_neighbours_and_probes_find_classes() -> None:
    """Separated classes score one, features without classes chance; intervals hold the value."""
    for score in (inspect.knn_top1, inspect.linear_top1):
        good = score(*clusters(0.05))
        assert good.value > 0.99 and good.low <= good.value <= good.high
        none = score(*clusters(50.0))
        assert none.low < 1 / 6 + 0.05 and none.value < 0.3


def test_similarity_ignores_rotations_and_nothing_else() -> None:
    """CKA is 1 for a rotated copy and low for other features of the same samples."""
    features, _ = clusters(0.5)
    turned = (features @ ortho_group.rvs(24, random_state=0)).astype(np.float32)
    assert inspect.linear_cka(features, 3 * turned + 1) == pytest.approx(1, abs=1e-5)
    other = np.random.default_rng(1).normal(size=(600, 24)).astype(np.float32)
    assert inspect.linear_cka(features, other) < 0.2


def test_the_verdict_asks_the_features() -> None:
    """Rising neighbours are learning, whatever the loss does; one dimension is a collapse."""
    weak, strong = inspect.knn_top1(*clusters(1.0)), inspect.knn_top1(*clusters(0.4))
    rank = inspect.rank_of(clusters(0.4)[0])
    assert inspect.judge_features(weak, strong, rank=rank, chance=1 / 6)[0] == "learning"
    assert inspect.judge_features(strong, strong, rank=rank, chance=1 / 6)[0] == "not learning"
    flat = np.outer(np.arange(600), np.ones(24)).astype(np.float32)
    collapsed = inspect.judge_features(weak, strong, rank=inspect.rank_of(flat), chance=1 / 6)
    assert collapsed[0] == "collapsed"


def test_the_picture_has_two_axes() -> None:
    """The plane is centred, its first axis the longer."""
    flat = inspect.plane(clusters(0.5)[0])
    assert flat.shape == (600, 2) and np.allclose(flat.mean(axis=0), 0, atol=1e-6)
    assert flat[:, 0].var() >= flat[:, 1].var()
