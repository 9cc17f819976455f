"""TimeSformer as a recipe: the contract, its plan, and the way back to upstream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from ablate.errors import LoadError
from ablate.recipes import timesformer
from ablate.recipes.timesformer.config import UPSTREAM
from ablate.testing import EvaluationContract, RecipeContract
from ablate.trial.recipe import absolute, load

ROOT = Path(__file__).parents[2]

FIELDS: dict[str, Any] = {
    "model_name": "tiny", "num_frames": 4, "sampling_rate": 2, "train_crop_size": 32,
    "test_crop_size": 32, "train_jitter_scales": [32, 36], "num_spatial_crops": 1,
    "random_flip": False, "optimizing_method": "adamw", "base_lr": 2e-3, "batch_size": 16,
    "max_epoch": 2, "steps": [0], "lrs": [1.0], "eval_period": 1, "checkpoint_period": 1,
    "num_workers": 0, "train_data": "few/train", "val_data": "few/val",
}  # fmt: skip
"""2 epochs of 3 steps on 48 clips of 4 motions."""


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the whole set, and `few` of it: 48 clips of 4 motions, 16 held out."""
    from ablate.training.data.emoji_video import prepare_emoji_video

    os.environ.setdefault("ABLATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    root = tmp_path_factory.mktemp("clips")
    whole = prepare_emoji_video(root / "emoji-video").folder
    link_few(whole, root)
    return root


def link_few(whole: Path, root: Path) -> None:
    """`few` under `root`: a few clips of the set `whole`."""
    for split, number in (("train", 12), ("val", 4)):
        for motion in ("left", "right", "up", "down"):
            target = root / "few" / split / motion
            target.mkdir(parents=True)
            for path in sorted((whole / split / motion).iterdir())[:number]:
                os.link(path, target / path.name)


class TestTimesformer(RecipeContract):
    name = "timesformer"
    objective = "clip_top1"
    fields: ClassVar[Mapping[str, Any]] = FIELDS

    @pytest.fixture(autouse=True)
    def _placed(self, clips: Path) -> None:
        self._clips = clips

    def root(self, tmp_path: Path) -> Path:
        return self._clips


class TestClipAccuracy(EvaluationContract):
    measures = ("clip_top1", "clip_top5")

    @pytest.fixture(autouse=True)
    def _placed(self, clips: Path) -> None:
        self._clips = clips

    def evaluated(self, tmp_path: Path) -> tuple[Any, torch.nn.Module]:
        task = timesformer.build(
            absolute(config(), root=self._clips), rank=0, world_size=1, device=torch.device("cpu")
        )
        return task.evaluations[0], task.learner.model


def config(**changes: Any) -> Any:
    return load("timesformer").Config(**{**FIELDS, **changes})


def test_a_missing_extra_is_told_with_the_line_that_installs_it(clips: Path) -> None:
    """Without transformers the plan says which extra to install, before anything starts."""
    code = (
        "import sys, json; sys.modules['transformers'] = None\n"
        "from pathlib import Path; from ablate.trial.recipe import load\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'transformers' else find(name, *rest)\n"
        "recipe = load('timesformer'); config = recipe.Config(**json.loads(sys.argv[1]))\n"
        "try: recipe.outline(config, workers=1, gpus=0, root=Path(sys.argv[2]))\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(FIELDS), str(clips)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "needs transformers" in done.stdout
    assert "pip install 'ablate-runner[video]'" in done.stdout


def test_the_plan_says_what_would_go_wrong(clips: Path) -> None:
    """Mirrored clips of left and right are warned of; a batch that cannot be shared, a size that
    the model does not take and steps that do not rise are refused with what to change."""
    ask = {"workers": 1, "gpus": 0, "root": clips}
    found = timesformer.outline(config(random_flip=True), **ask)
    assert any("random_flip: false" in warning for warning in found.warnings)
    assert found.steps == 6 and found.samples == 16
    with pytest.raises(ValueError, match="cannot be shared by 3 workers"):
        timesformer.outline(config(), **{**ask, "workers": 3})
    with pytest.raises(ValueError, match="no multiple of tiny's patches of 8 pixels"):
        config(train_crop_size=30, test_crop_size=30, train_jitter_scales=[30, 36])
    with pytest.raises(ValueError, match="must begin with 0, rise"):
        config(steps=[1, 2], lrs=[1.0, 0.1])
    assert timesformer.chance(config(), metric="clip_top1", root=clips) == 0.25


def test_all_parameters_are_in_one_group_and_time_begins_at_nothing(clips: Path) -> None:
    """Each parameter is in exactly one group; temporal branches after the first add nothing at
    the start, so a model that reads an image alike in all frames reads no time."""
    deep = timesformer.outline(config(), workers=1, gpus=0, root=clips, deep=True)
    groups = next(note for note in deep.notes if note.label == "decay").facts
    task = timesformer.build(
        config(train_data=str(clips / "few/train"), val_data=None),
        rank=0, world_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    model = task.learner.model
    assert groups["decay"]["parameters"] == sum(p.numel() for p in model.parameters())
    zero = [layer.temporal_dense.weight.any().item() for layer in model.timesformer.encoder.layer]
    assert zero == [True, False]


def test_upstreams_line_has_upstreams_keys() -> None:
    """Every word of the line is a key that upstream's defaults.py defines, with the values of its
    8x32 file where nothing was changed; what upstream cannot do is refused."""
    plain = load("timesformer").Config(train_data="k400/train.csv", val_data="k400/val.csv")
    words = timesformer.command(plain, workers=8)
    assert words[:4] == [
        "python", "tools/run_net.py", "--cfg", "configs/Kinetics/TimeSformer_divST_8x32_224.yaml"
    ]  # fmt: skip
    given = dict(zip(words[4::2], words[5::2], strict=True))
    assert set(given) - {"DATA.PATH_TO_DATA_DIR", "NUM_GPUS"} == set(UPSTREAM.values())
    assert set(given) <= KEYS
    assert given["SOLVER.STEPS"] == "[0, 11, 14]" and given["SOLVER.LRS"] == "[1.0, 0.1, 0.01]"
    assert given["SOLVER.BASE_LR"] == "0.005" and given["DATA.SAMPLING_RATE"] == "32"
    with pytest.raises(ValueError, match="frame_order 'shuffled' has no equal"):
        timesformer.command(plain.model_copy(update={"frame_order": "shuffled"}), workers=8)


KEYS = {
    f"{section}.{key}"
    for section, keys in {
        "TRAIN": "BATCH_SIZE EVAL_PERIOD CHECKPOINT_PERIOD",
        "TEST": "NUM_ENSEMBLE_VIEWS NUM_SPATIAL_CROPS",
        "DATA": "PATH_TO_DATA_DIR NUM_FRAMES SAMPLING_RATE MEAN STD TRAIN_JITTER_SCALES "
        "TRAIN_CROP_SIZE TEST_CROP_SIZE RANDOM_FLIP",
        "SOLVER": "BASE_LR LR_POLICY COSINE_END_LR STEPS LRS MAX_EPOCH MOMENTUM DAMPENING "
        "NESTEROV WEIGHT_DECAY WARMUP_EPOCHS WARMUP_START_LR OPTIMIZING_METHOD",
        "MODEL": "MODEL_NAME",
        "DATA_LOADER": "NUM_WORKERS PIN_MEMORY",
    }.items()
    for key in keys.split()
} | {"NUM_GPUS", "RNG_SEED"}
"""Of timesformer/config/defaults.py at 23e78bf."""


def test_an_exported_model_is_loaded_by_transformers(clips: Path, tmp_path: Path) -> None:
    """from_pretrained gives the same logits as the weights that were exported; other weights in
    their place are noticed."""
    import safetensors.torch
    from transformers import TimesformerForVideoClassification

    task = timesformer.build(
        config(train_data=str(clips / "few/train"), val_data=None),
        rank=0, world_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    model = task.learner.model.eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    timesformer.export_model(config(), tmp_path / "model.safetensors", tmp_path / "out")
    again = TimesformerForVideoClassification.from_pretrained(tmp_path / "out").eval()
    seen = torch.rand(2, 4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(seen).logits, model(seen).logits)
    assert "transformers loads it" in timesformer.check_model(str(tmp_path / "out"))
    other = {**model.state_dict(), "classifier.bias": model.classifier.bias.detach() + 1}
    safetensors.torch.save_file(other, tmp_path / "out" / "model.safetensors")
    with pytest.raises(LoadError, match="features differ"):
        timesformer.check_model(str(tmp_path / "out"))


@pytest.mark.exhaustive
def test_the_study_of_resumes_cut_down(clips: Path, tmp_path: Path) -> None:
    """studies/timesformer_resume.yaml with 90 steps on few clips, as its header says: all kept has
    the very result of the run without a break and no flag; an optimizer state that is lost or of
    another run, and a schedule that begins anew, are named by the marker, which the loss alone does
    not do."""
    import yaml

    study = yaml.safe_load((ROOT / "studies" / "timesformer_resume.yaml").read_text())
    study["baseline"] |= {
        "train_data": str(clips / "few/train"), "val_data": str(clips / "few/val"),
        "batch_size": 16, "max_epoch": 30, "eval_period": 30, "checkpoint_period": 30,
        "steps": [0, 15],
    }  # fmt: skip
    study |= {"name": "cut", "seeds": [0], "gang": {"workers": 1}}
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(study))
    for line in ("train cut.yaml --seed 7 --out runs/timesformer_other",
                 "launch cut.yaml --cluster local --yes"):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "ablate.cli", *line.split()],
            cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for path in (tmp_path / "runs" / "cut" / "trials").glob("*/attempts/*/result.json"):
        broken = json.loads((path.parents[2] / "trial.json").read_text())["config"]["interruption"]
        name = broken and (broken["optimizer"], broken["schedule"])
        result = json.loads(path.read_text())
        found[name] = (result["final"]["clip_top1"], result["flags"])
    assert found[None] == found["kept", "kept"]
    assert "RESUME_JUMP" in found["lost", "kept"][1]
    assert "RESUME_JUMP" in found["foreign", "kept"][1]
    assert "SCHEDULE_RESTARTED" in found["kept", "restarted"][1]
    assert not {"RESUME_JUMP", "SCHEDULE_RESTARTED"} & set(found[None][1])
