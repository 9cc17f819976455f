"""Telling learning from not learning, by weights and by features, on real runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from scipy.stats import ortho_group
from sessions import alone
from small_trials import config, draw, make_data, run, write_trial
from typer.testing import CliRunner

from ablate.cli.app import app
from ablate.errors import CheckpointError
from ablate.recipes import openclip
from ablate.training import checkpoint
from ablate.training.evaluations import scores
from ablate.training.inspection import inspect, movement
from ablate.training.inspection.specimen import Specimen
from ablate.training.loop import Run
from ablate.training.ranks import Gang
from ablate.training.task import Task
from ablate.trial.recipe import absolute

ALONE = Gang(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A trial folder with checkpoints after 6 and 12 steps."""
    record = write_trial(tmp_path_factory.mktemp("inspect") / "t", data)
    assert run(record.folder) == [0]
    return record.folder


def step(folder: Path, number: int) -> Path:
    return checkpoint.path_of(folder / "checkpoints", number)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = inspect.open_weights(path, first=False).tensors
    assert found is not None
    return dict(found)


def fresh_model(seed: int) -> Any:
    openclip.model.register_models()
    torch.manual_seed(seed)
    return open_clip.create_model("tiny-rn-a")


def run_changed(
    folder: Path, data: Path, change: Callable[[Task], Task], **fields: Any
) -> inspect.Inspection:
    """Train a trial in which something is wrong (or odd) by the real loop; what is then found."""
    record = write_trial(folder, data, **fields)
    chosen = absolute(config(**fields), root=data)
    task = change(openclip.build(chosen, rank=0, world_size=1, device=torch.device("cpu")))
    with alone(record.folder) as session:
        Run(task, ALONE, session).train()
    return inspect.inspect_paths(record.folder)


# --------------------------------------------------------------------------- weights


def test_a_checkpoint_does_not_differ_from_itself(trial: Path) -> None:
    """The self-difference is exactly zero, and that is what the flag says."""
    a = tensors(step(trial, 6))
    found = movement.compare_weights(a, a)
    assert all(change.distance == 0 and change.largest == 0 for change in found.changes)
    assert found.flags == ("no change",)
    assert all(module.moved == 0 and module.relative == 0 for module in found.modules())


def test_a_sound_run_has_no_flags(trial: Path) -> None:
    """Every parameter moved, none by more than Adam can in six steps."""
    later = inspect.open_weights(step(trial, 12), first=False)
    assert later.tensors is not None
    found = movement.compare_weights(
        tensors(step(trial, 6)),
        later.tensors,
        moments=later.moments,
        zero_gradients=later.zero_gradients,
    )
    assert found.flags == ()
    assert {"visual.layer1.0", "transformer.resblocks.0"} <= {m.name for m in found.modules()}
    assert all(0 < c.largest < 6 * 1e-3 * 3 for c in found.parameters)
    assert inspect.inspect_paths(trial).flags == ()


def test_first_step_of_adamw_is_bounded_by_its_learning_rate(tmp_path: Path, data: Path) -> None:
    """After one step no number is further away than lr (1 + wd |w|)."""
    record = write_trial(tmp_path / "t", data, batch_size=96, epochs=1, warmup=0)
    assert run(record.folder) == [0]
    chosen = absolute(config(), root=data)
    before = openclip.specimen(chosen, data=None, device=torch.device("cpu")).model.state_dict()
    after = tensors(step(record.folder, 1))
    for change in movement.compare_weights(before, after).parameters:
        largest = float(before[change.name].abs().max())
        assert change.largest <= 1e-3 * (1 + 0.2 * largest) * 1.01, change.name
        # bn3's gains begin at zero (a ModifiedResNet's blocks begin as identities), so what lies
        # before them in a block has no gradient in the first step.
        assert change.moved or ".bn" in change.name or ".conv" in change.name, change.name


def test_what_must_not_move_is_noticed(trial: Path) -> None:
    """A tower that was to be frozen and moved."""
    a, b = tensors(step(trial, 6)), tensors(step(trial, 12))
    (flag,) = movement.compare_weights(a, b, frozen=["transformer.*"]).flags
    assert flag.startswith("frozen but moved") and "transformer.resblocks" in flag


def test_a_tower_frozen_by_mistake_is_noticed(tmp_path: Path, data: Path) -> None:
    """In a real run whose image tower takes no gradient; a tower that the configuration freezes
    is counted and no flag."""

    def freeze(task: Task) -> Task:
        for parameter in task.learner.model.visual.parameters():  # type: ignore[union-attr]
            parameter.requires_grad_(False)
        return task

    found = run_changed(tmp_path / "mistake", data, freeze, epochs=1)
    (flag,) = found.flags
    assert flag.startswith("trainable but static") and "visual.conv1" in flag
    assert {m.name.split(".")[0] for m in found.modules if not m.moved} == {"visual"}
    meant = run_changed(tmp_path / "meant", data, lambda task: task, epochs=1, lock_image=True)
    assert meant.flags == () and meant.frozen > 50


def test_an_optimizer_with_a_stale_copy_is_noticed(tmp_path: Path, data: Path) -> None:
    """In a real run whose optimizer was built on a copy of the model: gradients arrive, the loss
    is finite, BatchNorm's statistics move, and no parameter does."""

    def stale(task: Task) -> Task:
        other = copy.deepcopy(task.learner.model)
        task.learner.optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
        return task

    found = run_changed(tmp_path / "t", data, stale, epochs=1)
    assert found.verdict == "not learning" and found.moved == 0
    assert found.flags[0].startswith("only BatchNorm statistics changed")
    assert "holds another copy" in found.flags[1]


def test_moments_without_movement_are_noticed_too(trial: Path) -> None:
    """A checkpoint whose optimizer has state for parameters that stand still."""
    a = tensors(step(trial, 6))
    later = inspect.open_weights(step(trial, 12), first=False)
    flags = movement.compare_weights(a, a, moments=later.moments).flags
    assert flags[0] == "no change" and "holds another copy" in flags[1]


def test_random_initialisation_is_noticed(tmp_path: Path, trial: Path, data: Path) -> None:
    """Of the trial's own seed to the bit, of any other seed by its distribution."""
    chosen = absolute(config(), root=data)
    own = openclip.specimen(chosen, data=None, device=torch.device("cpu")).model.state_dict()
    everything = movement.at_initialisation(own, own)
    assert "visual.conv1.weight" in everything and "visual.bn1.weight" not in everything
    assert movement.at_initialisation(tensors(step(trial, 12)), own) == ()
    same, judged = movement.like_initialisation(fresh_model(77).state_dict(), own)
    assert judged > 30 and len(same) > 0.9 * judged
    path = tmp_path / "random.safetensors"
    safetensors.torch.save_file(fresh_model(77).state_dict(), path)
    found = inspect.inspect_paths(trial, path)
    assert any(flag.startswith("B is distributed as at random init") for flag in found.flags)
    assert any(flag.startswith("nothing in common with A") for flag in found.flags)
    assert found.verdict != "learning"


def test_a_half_loaded_state_dict_is_noticed(tmp_path: Path, trial: Path) -> None:
    """Trained weights of which one tower was left at another random initialisation, in a file as
    open_clip's distributed training writes it."""
    trained, other = tensors(step(trial, 12)), fresh_model(78).state_dict()
    half = {n: other[n] if n.startswith("visual.") else t for n, t in trained.items()}
    path = tmp_path / "epoch_1.pt"
    named = {f"module.{name}": value for name, value in half.items()}
    torch.save({"epoch": 1, "name": "x", "state_dict": named, "optimizer": {"state": {}}}, path)
    found = inspect.inspect_paths(step(trial, 12), path)
    lost = [flag for flag in found.flags if flag.startswith("nothing in common with A")]
    assert len(lost) == 1 and "visual.layer1" in lost[0] and "transformer" not in lost[0]
    (random,) = [flag for flag in found.flags if flag.startswith("distributed as at random")]
    assert "visual.layer1" in random and "transformer" not in random
    chosen = absolute(config(), root=Path(root_of(trial)))
    specimen = openclip.specimen(chosen, data=None, device=torch.device("cpu"))
    initial = {n: t.clone() for n, t in specimen.model.state_dict().items()}
    own = {n: initial[n] if n.startswith("visual.") else t for n, t in trained.items()}
    again = inspect.inspect(
        inspect.Weights(title="a", tensors=trained),
        inspect.Weights(title="b", tensors=own, known_seed=True),
        specimen,
    )
    (flag,) = [flag for flag in again.flags if flag.startswith("at random initialisation")]
    assert "visual.conv1" in flag and "transformer" not in flag


def test_only_weights_can_be_compared_without_data(tmp_path: Path, trial: Path) -> None:
    """Two files of no trial: what moved is said, what could not be judged too; with the model and
    images given, features are judged."""
    files = []
    for number in (6, 12):
        files.append(tmp_path / f"{number}.safetensors")
        files[-1].write_bytes((step(trial, number) / "model.safetensors").read_bytes())
    found = inspect.inspect_paths(*files)
    assert found.verdict == "undecided" and found.features is None
    assert found.moved == found.parameters == 96 and found.flags == ()
    assert "--model" in found.not_judged[0] and "random initialisation" in found.not_judged[1]
    val = json.loads((trial / "trial.json").read_text())["root"] + "/val"
    found = inspect.inspect_paths(*files, model="tiny-rn-a", data=val)
    assert found.flags == ()
    assert found.verdict != "undecided" and found.features is not None and found.images == 12
    assert inspect.inspect_paths(*files, model="tiny-rn-a").not_judged[0].startswith("features: no")
    other = inspect.inspect_paths(*files, model="ViT-S-32-alt", data=val)
    assert "do not fit the model" in other.not_judged[0]


def test_of_several_state_dicts_the_asked_one_is_compared(tmp_path: Path) -> None:
    """A student and its teacher in one file, as self-supervised training keeps them: which one is
    meant is asked for, taken, and named."""
    first, last = ({"net.weight": torch.full((2, 2), value)} for value in (1.0, 2.0))
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    torch.save({"student": first, "teacher": first}, paths[0])
    torch.save({"student": last, "teacher": first, "epoch": 2}, paths[1])
    with pytest.raises(CheckpointError, match="Say which: --key teacher"):
        inspect.inspect_paths(*paths)
    found = {key: inspect.inspect_paths(*paths, key=key) for key in ("student", "teacher")}
    assert {key: (f.b, f.moved) for key, f in found.items()} == {
        "student": ("b.pt, its student", 1), "teacher": ("b.pt, its teacher", 0),
    }  # fmt: skip


def test_damaged_and_missing_checkpoints_are_errors(tmp_path: Path, trial: Path) -> None:
    """What is compared must be whole, and one checkpoint alone is no comparison."""
    with pytest.raises(CheckpointError, match="no whole checkpoint.*Give a trial folder"):
        inspect.inspect_paths(tmp_path, tmp_path)
    with pytest.raises(CheckpointError, match="does not exist; give a trial folder"):
        inspect.inspect_paths(trial, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="give a second one"):
        inspect.inspect_paths(step(trial, 6))
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="os.system among its tensors, which would run code"):
        inspect.inspect_paths(trial, tmp_path / "evil.pt")


# --------------------------------------------------------------------------- features


EMOJI = {
    "train_data": "train/{00000..00007}.tar", "train_num_samples": 1536, "batch_size": 64,
    "epochs": 1, "zeroshot_frequency": 0, "warmup": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, inspect.Inspection]:
    """12 steps on shapes under a loss that is 1 at every step: its gradient is the real one's."""

    def flatten(task: Task) -> Task:
        steep = task.learner.loss

        def loss(model: Any, batches: Any, backward: Any) -> Any:
            values = steep(model, batches, lambda loss: backward(loss / loss.detach()))
            return {**values, "loss": values["loss"] / values["loss"]}

        task.learner.loss = loss  # type: ignore[method-assign]
        return task

    root = make_data(tmp_path_factory.mktemp("flat") / "shapes")
    rng = np.random.default_rng(11)
    for kind, place in enumerate(sorted(root.glob("val/*/"))):
        for number in range(50):
            (place / f"more{number}.jpg").write_bytes(draw(kind, rng))
    folder = root.parent / "t"
    return folder, run_changed(folder, root, flatten, zeroshot_frequency=0)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> tuple[Path, inspect.Inspection]:
    """12 steps on emoji at a learning rate whose steps mostly vanish in the rounding."""
    folder = tmp_path_factory.mktemp("still") / "t"
    fields = {**EMOJI, "train_num_samples": 768, "lr": 1e-9}
    return folder, run_changed(folder, emoji, lambda task: task, **fields)


def emoji_specimen(emoji: Path) -> Specimen:
    chosen = absolute(config(**EMOJI), root=emoji)
    return openclip.specimen(chosen, data=None, device=torch.device("cpu"))


def test_a_flat_loss_with_rising_features_is_learning(
    flat: tuple[Path, inspect.Inspection],
) -> None:
    """The loss is one at every step, zero-shot classification of unseen pictures rises from chance:
    learning. BatchNorm's running statistics lag so far behind that they still hide it."""
    folder, found = flat
    rows = inspect_rows(folder)
    assert len(rows) == 12 and {row["loss"] for row in rows} == {1.0}
    assert found.verdict == "learning" and found.flags == ()
    assert found.gains["zero_shot"].low > 0.3 and found.images == 212 and found.classes == 4
    assert found.reasons[0].startswith("zero-shot")
    assert found.cka is not None and 0 < found.cka < 0.95


@pytest.mark.exhaustive
def test_fitted_batch_norm_statistics_are_no_learning(
    still: tuple[Path, inspect.Inspection], emoji: Path
) -> None:
    """With a learning rate of nothing the running statistics still follow the data, and they alone
    make a random network better at telling images apart: with fitted ones on both sides nothing
    rises. Gradients arrive and steps vanish, and the flag names that."""
    folder, found = still
    assert found.verdict == "not learning", found.reasons
    assert any(what.startswith("BatchNorm statistics") for what in found.not_judged)
    assert abs(found.gains["knn"].value) < 0.01
    assert any("holds another copy" in flag and "vanish" in flag for flag in found.flags)
    specimen = emoji_specimen(emoji)
    rows, labels = np.arange(1234), torch.from_numpy(specimen.labels)
    before = scores.knn_correct(specimen.features(specimen.model, rows), labels)
    specimen.model.load_state_dict(tensors(step(folder, 12)))
    after = scores.knn_correct(specimen.features(specimen.model, rows), labels)
    assert scores.gain(before, after).low > 0.05


def test_fitting_sets_the_statistics_that_training_mode_uses(emoji: Path) -> None:
    """Features of one batch with statistics fitted to it are those of training mode; the momenta
    are as before, and the model is in eval mode."""
    specimen = emoji_specimen(emoji)
    rows = np.arange(64)
    norms = [m for m in specimen.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    inspect.fit_statistics(specimen, rows)
    fitted = specimen.features(specimen.model, rows)
    assert {norm.momentum for norm in norms} == {0.1} and not any(m.training for m in norms)
    for norm in norms:
        norm.training = True
    # Running variances are the unbiased ones: n / (n - 1), n the positions of a channel.
    torch.testing.assert_close(
        fitted, specimen.features(specimen.model, rows), rtol=0.02, atol=2e-3
    )


def inspect_rows(folder: Path) -> list[dict[str, Any]]:
    from ablate.records.folder import TrialRecord

    return TrialRecord(folder).trace()


def test_collapsed_features_are_noticed(
    tmp_path: Path, flat: tuple[Path, inspect.Inspection]
) -> None:
    """A projection to one direction, or weights that are no numbers."""
    folder, _ = flat
    for name, content in (("line", 0.0), ("nan", float("nan"))):
        broken = tensors(step(folder, 12))
        broken["visual.attnpool.c_proj.weight"][1:] = content
        broken["visual.attnpool.c_proj.bias"][1:] = content
        safetensors.torch.save_file(broken, tmp_path / f"{name}.safetensors")
        found = inspect.inspect_paths(folder, tmp_path / f"{name}.safetensors", images=200)
        assert found.verdict == "collapsed", name


@pytest.mark.exhaustive
def test_a_run_that_collapses_is_noticed(tmp_path: Path, emoji: Path) -> None:
    """A learning rate thirty times too large without warmup ends in one direction."""
    fields = {**EMOJI, "lr": 3e-2, "warmup": 1, "beta2": 0.999, "wd": 0.0}
    found = run_changed(tmp_path / "t", emoji, lambda task: task, **fields)
    assert found.verdict == "collapsed", (found.reasons, found.features)


@pytest.mark.exhaustive
def test_no_progress_is_not_learning(still: tuple[Path, inspect.Inspection], emoji: Path) -> None:
    """Weights that moved a little and in no direction, between two sides whose BatchNorm
    statistics are compared as they are."""
    folder, _ = still
    before = tensors(step(folder, 12))
    rng = torch.Generator().manual_seed(0)
    after = {
        n: t + 1e-3 * t.std() * torch.randn(t.shape, generator=rng) if t.ndim > 1 else t
        for n, t in before.items()
    }
    found = inspect.inspect(
        inspect.Weights(title="a", tensors=before), inspect.Weights(title="b", tensors=after),
        emoji_specimen(emoji), prompts=617,
    )  # fmt: skip
    assert found.verdict == "not learning" and "nothing rose" in found.reasons[0]
    assert not any("BatchNorm" in what for what in found.not_judged)


def root_of(folder: Path) -> str:
    root: str = json.loads((folder / "trial.json").read_text())["root"]
    return root


def test_the_command_shows_and_draws(tmp_path: Path, flat: tuple[Path, inspect.Inspection]) -> None:
    """`ablate inspect` prints the verdict, gives JSON, and draws both feature spaces."""
    folder, found = flat
    shown = CliRunner().invoke(app, ["inspect", str(folder), "--images", "100"])
    assert shown.exit_code == 0, shown.output
    assert "verdict  learning" in shown.output and "96 of 96 parameter tensors" in shown.output
    picture = tmp_path / "p.png"
    told = CliRunner().invoke(
        app, ["inspect", str(folder), str(folder), "--json", "--picture", str(picture)]
    )
    content = json.loads(told.stdout)
    assert content["verdict"] == "learning" and len(content["modules"]) > 10
    for side, features in zip("ab", found.features or (), strict=True):
        assert content["features"][side]["knn"]["value"] == features.knn.value
    chance = content["features"]["a"]["zero_shot"]
    assert chance["low"] < chance["value"] < chance["high"] < 0.5
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size[0] > 1500 and np.unique(np.asarray(image)).size > 100


def clusters(spread: float, *, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(9).normal(size=(6, 24)) / np.sqrt(24)
    points = centres[rng.integers(6, size=600)] + spread * rng.normal(size=(600, 24))
    return torch.from_numpy(points.astype(np.float32))


def test_similarity_ignores_rotations_and_nothing_else() -> None:
    """CKA is 1 for a rotated copy and low for other features of the same samples."""
    features = clusters(0.5)
    turned = features.numpy() @ ortho_group.rvs(24, random_state=0).astype(np.float32)
    assert scores.linear_cka(features, 3 * torch.from_numpy(turned) + 1) == pytest.approx(
        1, abs=1e-5
    )
    assert scores.linear_cka(features, torch.randn(600, 24)) < 0.2


def test_the_plane_has_two_axes() -> None:
    """It is centred, its first axis the longer."""
    flat_points = scores.plane(clusters(0.5))
    assert flat_points.shape == (600, 2) and np.allclose(flat_points.mean(axis=0), 0, atol=1e-6)
    assert flat_points[:, 0].var() >= flat_points[:, 1].var()


def test_few_images_keep_whole_classes() -> None:
    """Within the bound, evenly spaced classes with several images each; all of a small set."""
    labels = np.repeat(np.arange(1000), 50)
    rows = inspect.choose(labels, 1024)
    names, counts = np.unique(labels[rows], return_counts=True)
    assert len(rows) <= 1024 and set(counts) == {16} and len(names) == 64
    assert names[0] == 0 and names[-1] == 999
    assert len(inspect.choose(labels[:900], 1024)) == 900
