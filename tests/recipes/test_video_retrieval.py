"""Text-video retrieval as a recipe: the contract, and weights that were loaded in part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch

from ablate.errors import LoadError
from ablate.recipes import video_retrieval
from ablate.testing import EvaluationContract, RecipeContract
from ablate.training.inspection.inspect import trial_record
from ablate.training.ranks import Gang
from ablate.trial.recipe import load

FIELDS: dict[str, Any] = {
    "model": "tiny-video", "image_res": 32, "max_txt_l": 16, "freeze_vision": False,
    "freeze_text": False, "temp": 0.07, "num_frames": 2, "num_frames_test": 2, "batch_size": 16,
    "lr": 2e-3, "epochs": 2, "warmup_epochs": 0.5, "precision": "fp32", "num_workers": 0,
    "train_data": "few_train.json", "val_data": "few_val.json", "seed": 0,
}  # fmt: skip
"""2 epochs of 4 steps on 64 clips; 64 more to retrieve."""


class TestVideoRetrieval(RecipeContract):
    name = "video_retrieval"
    objective = "t2v_r1"
    fields: ClassVar[Mapping[str, Any]] = FIELDS

    @pytest.fixture(autouse=True)
    def _placed(self, captioned: Path) -> None:
        self._clips = captioned

    def root(self, tmp_path: Path) -> Path:
        return self._clips


class TestClipRetrieval(EvaluationContract):
    measures = tuple(f"{way}_r{k}" for way in ("t2v", "v2t") for k in (1, 5, 10))

    @pytest.fixture(autouse=True)
    def _placed(self, captioned: Path) -> None:
        self._clips = captioned

    def evaluated(self, tmp_path: Path) -> tuple[Any, torch.nn.Module]:
        task = build(self._clips)
        return task.evaluations[0], task.learner.model


def config(root: Path, **changes: Any) -> Any:
    placed = {name: str(root / FIELDS[name]) for name in ("train_data", "val_data")}
    return load("video_retrieval").Config(**{**FIELDS, **placed, **changes})


def build(root: Path, **changes: Any) -> Any:
    return video_retrieval.build(
        config(root, **changes), rank=0, world_size=1, device=torch.device("cpu")
    )


@pytest.fixture(scope="session")
def files(captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a model of seed 7 that saw a few batches, whole and as they go wrong."""
    folder = tmp_path_factory.mktemp("weights")
    task = build(captioned, seed=7)
    learner = task.learner
    ids = torch.arange(16).numpy()
    for step in range(4):
        learner.optimizer.zero_grad()
        learner.rates(step)
        tensors, _ = task.data.samples.batch(ids + 16 * step, ids.astype("uint64"))
        learner.loss(learner.model, [tensors], lambda loss: loss.backward())
        learner.optimizer.step()
    whole = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for name, tensors in {
        "whole": whole,
        "prefixed": {f"module.{name}": value for name, value in whole.items()},
        "vision_only": {n: v for n, v in whole.items() if n.startswith("visual.")},
        "no_statistics": {n: v for n, v in whole.items() if "running_" not in n},
    }.items():
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    return folder


def loaded(root: Path, file: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    task = build(root, init_from={"path": str(file), **options})
    return task.facts["init_from"], task.learner.model


def test_whole_and_mapped_weights_are_the_same_model(captioned: Path, files: Path) -> None:
    """A file is loaded whole, or through a key map, to the same tensors; both loads of it give the
    same features of frames and texts."""
    whole, model = loaded(captioned, files / "whole.safetensors")
    mapped, other = loaded(captioned, files / "prefixed.safetensors", key_map=[[r"^module\.", ""]])
    for report in (whole, mapped):
        assert report["loaded_share"] == 1.0 and not report["missing"]
        assert report["reload_cosine_video"] > 0.999 and report["reload_cosine_text"] > 0.999
    assert len(mapped["renamed"]) == whole["loaded_tensors"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("name", ["prefixed", "vision_only", "no_statistics"])
def test_gaps_are_refused_and_silence_is_a_named_control(
    captioned: Path, files: Path, name: str
) -> None:
    """A file with gaps is refused with names; on_gap: silent loads it, the plan calls it a negative
    control, and the report says what is at random: one of two cosines, or buffers, show it."""
    file = files / f"{name}.safetensors"
    with pytest.raises(LoadError, match="does not fit the model: missing in the file"):
        loaded(captioned, file)
    report, _ = loaded(captioned, file, on_gap="silent")
    cosines = [report[f"reload_cosine_{kind}"] for kind in ("video", "text")]
    if name == "prefixed":
        assert report["loaded_share"] == 0.0 and max(cosines) < 0.9
    elif name == "vision_only":
        assert cosines[0] > 0.999 > cosines[1]
    else:  # all parameters are there, and no second load tells
        assert report["loaded_share"] == 1.0 and min(cosines) > 0.999
        assert len(report["buffers_missing"]) == len(report["missing"]) > 10
    planned = video_retrieval.outline(
        config(captioned, init_from={"path": str(file), "on_gap": "silent"}),
        workers=1, gpus=0, root=captioned,
    )  # fmt: skip
    [told] = [warning for warning in planned.warnings if "negative control" in warning]
    assert ("buffers" in told) == bool(report["buffers_missing"])


def test_frozen_towers_have_no_optimizer(captioned: Path) -> None:
    """What is frozen is in no group, and only the projection of a frozen tower can be left open;
    towers at random that are frozen are warned of."""
    task = build(captioned, freeze_vision=True, freeze_text=True)
    trained = [n for n, p in task.learner.model.named_parameters() if p.requires_grad]
    assert trained == [
        "logit_scale",
        "visual.attnpool.c_proj.weight",
        "visual.attnpool.c_proj.bias",
    ]
    assert sum(len(g["params"]) for g in task.learner.optimizer.param_groups) == len(trained)
    planned = video_retrieval.outline(
        config(captioned, freeze_vision=True), workers=1, gpus=0, root=captioned
    )
    assert any("keeps a random tower" in warning for warning in planned.warnings)
    assert video_retrieval.chance(config(captioned), metric="v2t_r5", root=Path()) == 5 / 64


def test_a_look_at_a_model_asks_what_its_evaluation_asks(captioned: Path) -> None:
    """Of the clips of val_data the look finds as many by their captions as t2v_r1 says, with no
    neighbours, for each is a class of its own; a trial's record says whether that rose."""
    task = build(captioned)
    model = task.learner.model.eval()
    measured = task.evaluations[0].run(model, Gang(0, 1, 0, 1, torch.device("cpu")))
    looked = video_retrieval.specimen(config(captioned), data=None, device=torch.device("cpu"))
    rows = np.arange(len(looked.labels))
    right = looked.own["text_to_video"](model, looked.features(model, rows), rows, None)
    assert len(rows) == 64 and float(right.double().mean()) == measured["t2v_r1"]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3)
    told = trial_record(lambda: looked, task.learner, step=8)
    assert set(told["gains"]) == {"text_to_video"} and told["features"]["a"]["knn"] is None


def test_an_exported_model_is_loaded_by_open_clip(captioned: Path, tmp_path: Path) -> None:
    """open_clip loads the folder as local-dir and gives the features of the trained model; other
    weights in their place are noticed."""
    import open_clip

    model = build(captioned).learner.model.eval()
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file(dict(model.state_dict()), weights)
    video_retrieval.export_model(config(captioned), weights, tmp_path / "out")
    again, _, _ = open_clip.create_model_and_transforms(
        f"local-dir:{tmp_path / 'out'}", require_pretrained=True
    )
    again.eval()
    frames = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.encode_image(frames), model.encode_image(frames))
    assert "open_clip loads it" in video_retrieval.check_model(str(tmp_path / "out"))
    other = {**model.state_dict(), "text_projection": model.text_projection.detach().flip(0)}
    safetensors.torch.save_file(other, tmp_path / "out" / "open_clip_model.safetensors")
    with pytest.raises(LoadError, match="features differ.*text"):
        video_retrieval.check_model(str(tmp_path / "out"))
