"""Finished models are measured by the code that measures in training, wherever they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from small_trials import log_of, make_data, run, write_trial

from ablate.errors import DataError, LoadError, StudyError
from ablate.recipes import openclip
from ablate.report.evaluate import Asked, evaluate
from ablate.trial.recipe import load

EVALUATIONS = [
    {"kind": "knn", "neighbours": 3},
    {"kind": "linear", "path": "val"},
    {"kind": "zero_shot", "path": "val", "name": "again"},
    {"kind": "retrieval", "path": "train/00000.tar"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def trial(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trial of six steps that has measured all kinds."""
    folder = tmp_path_factory.mktemp("trial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ABLATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = write_trial(folder / "one", data, epochs=1, evaluations=EVALUATIONS)
        assert run(made.folder) == [0], log_of(made)
    return made


def measured(row: dict[str, float]) -> dict[str, float]:
    """The numbers that are no times."""
    known = ("imagenet", "knn", "linear", "zero", "retrieval")
    return {name: value for name, value in row.items() if name.partition("_")[0] in known}


def setting(folder: Path, trial: Any) -> Path:
    """What an export writes of the trial."""
    config = {k: v for k, v in trial.trial()["config"].items() if k != "seed"}
    content = {"recipe": "openclip", "baseline": config, "seeds": [0]}
    path = folder / "config.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def test_a_trial_measures_again_what_it_measured(trial: Any) -> None:
    """Its folder alone is enough: all kinds of evaluation, the same numbers."""
    again = evaluate(str(trial.folder), Asked())
    assert measured(again) == measured(trial.evaluations()[-1])
    assert {"imagenet_top1", "knn_top1", "linear_top1", "zero_shot_top1/again"} < set(again)
    [checkpoint] = (trial.folder / "checkpoints").glob("step-*")
    few = evaluate(str(checkpoint), Asked(images=f"{trial.trial()['root']}/val", kinds=("knn",)))
    assert list(measured(few)) == ["knn_top1"]


def test_the_peers_checkpoint_is_measured_like_the_setting(
    tmp_path: Path, data: Path, trial: Any
) -> None:
    """A .pt as open_clip_train saves it, under DDP's names, measures the same; its architecture is
    the setting's."""
    [file] = (trial.folder / "checkpoints").glob("step-*/model.safetensors")
    weights = safetensors.torch.load_file(file)
    content = {"epoch": 1, "name": "run", "optimizer": {}}
    state = {f"module.{name}": value for name, value in weights.items()}
    torch.save({**content, "state_dict": state}, tmp_path / "epoch_1.pt")
    like = setting(tmp_path, trial)
    found = evaluate(str(tmp_path / "epoch_1.pt"), Asked(), like=like, root=data)
    assert list(found)[0] == "imagenet_top1", "the objective comes first"
    assert measured(found) == measured(trial.evaluations()[-1])
    with pytest.raises(LoadError, match="--like"):
        evaluate(str(tmp_path / "epoch_1.pt"), Asked(images=str(data / "val")))
    with pytest.raises(LoadError, match="does not load into the model"):
        evaluate(str(tmp_path / "epoch_1.pt"), Asked(images=str(data / "val")), name="ViT-S-32-alt")


def test_an_exported_model_is_measured(tmp_path: Path, data: Path, trial: Any) -> None:
    """A folder that open_clip loads needs no setting; of no kind named, all that the data allow."""
    [file] = (trial.folder / "checkpoints").glob("step-*/model.safetensors")
    config = load("openclip").Config(**trial.trial()["config"])
    openclip.export_model(config, file, tmp_path / "model")
    pairs = str(data / "train" / "00000.tar")
    found = evaluate(str(tmp_path / "model"), Asked(images=str(data / "val"), pairs=pairs))
    last = trial.evaluations()[-1]
    assert found["zero_shot_top1"] == last["imagenet_top1"]
    assert found["retrieval_i2t_r5"] == last["retrieval_i2t_r5"]
    assert {"knn_top1", "linear_top1"} < set(found)


REFUSED: dict[str, tuple[str, Asked, str]] = {
    "nothing there": ("no/such", Asked(images="v"), "is no model: neither.*ViT-B-32/openai"),
    "unknown weights": ("ViT-B-32/openia", Asked(images="v"), "did you mean 'openai'"),
    "unknown kind": ("x", Asked(images="v", kinds=("knm",)), "did you mean 'knn'"),
    "no pairs": ("x", Asked(images="v", kinds=("retrieval",)), "retrieval needs.*--pairs"),
}


@pytest.mark.parametrize(("source", "asked", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_measured_is_said(source: str, asked: Asked, says: str) -> None:
    """The message names what is allowed, or the next action."""
    with pytest.raises((LoadError, DataError), match=says):
        evaluate(source, asked)


def test_a_model_alone_asks_for_data(tmp_path: Path, trial: Any) -> None:
    """Without data and without a setting there is nothing to measure; a wrong setting is said."""
    [file] = (trial.folder / "checkpoints").glob("step-*/model.safetensors")
    config = load("openclip").Config(**trial.trial()["config"])
    openclip.export_model(config, file, tmp_path / "model")
    with pytest.raises(DataError, match="--images FOLDER"):
        evaluate(str(tmp_path / "model"), Asked())
    with pytest.raises(StudyError, match="does not exist"):
        evaluate(str(tmp_path / "model"), Asked(), like=tmp_path / "none.yaml")
    assert open_clip.get_model_config("tiny-rn-a")
