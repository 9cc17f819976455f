"""The studies of mae, swav and openclip, cut down: what a setting does shows in what is told."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ablate.cluster.local import LocalCluster
from ablate.records.folder import StudyRecord, TrialRecord
from ablate.runner import controller, hold
from ablate.runner.plan.plan import plan
from ablate.study import load_study, parse_study
from ablate.training.data.emoji import prepare_emoji
from ablate.training.data.emoji_groups import prepare_emoji_groups
from ablate.trial.recipe import load
from tests.scripted_studies import Recorder

STUDIES = Path(__file__).parents[2] / "studies"
HERE = (
    "mae_weight_decay",
    "swav_collapse",
    "timesformer_resume",
    "retrieval_loading",
    "openclip_markers",
)
CLUSTER = ("mae_vit_b_imagenet", "swav_rn50_bs256", "timesformer_k400", "retrieval_msrvtt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where data/emoji-groups lies."""
    os.environ.setdefault("ABLATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path_factory.mktemp("root")
    prepare_emoji_groups(folder / "data" / "emoji-groups")
    return folder


def run(
    name: str, root: Path, *, seed: int, keep: Mapping[str, Any], **fields: Any
) -> dict[str, TrialRecord]:
    """The study of that name with these factors and fields and one seed; its trials by level."""
    text = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    text["baseline"] |= fields
    text |= {"factors": dict(keep), "controls": {}, "seeds": [seed]}
    text.pop("hypothesis", None)  # it names levels that are not kept
    study = parse_study(yaml.safe_dump(text), path=f"{name}.yaml", root=root)
    record = StudyRecord(root / "runs" / name)
    told = Recorder()
    with hold.controlling(record), LocalCluster(num_cpus=2) as cluster:
        controller.launch(study, record, cluster=cluster, book=told, mirror=told)
    return by_level(record, keep)


def by_level(record: StudyRecord, factors: Mapping[str, Any]) -> dict[str, TrialRecord]:
    """Its trials by the level that differs from the first of each factor; "" for none."""
    found = {}
    for trial in record.records():
        levels = trial.trial()["levels"]
        apart = [level for name, level in levels.items() if level != str([*factors[name]][0])]
        found[apart[0] if apart else ""] = trial
    return found


def last(trial: TrialRecord, name: str) -> float:
    """The last value of a measurement, of steps or of evaluations."""
    rows = [row for row in (*trial.trace(), *trial.evaluations()) if name in row]
    return float(rows[-1][name])


@pytest.mark.exhaustive
def test_positions_of_zero_and_decayed_norms_show(root: Path) -> None:
    """In 80 steps an encoder that knows no positions gets less than half as far below predicting
    nothing; where everything decays, LayerNorms shrink by exp(-sum of lr x weight_decay), and the
    reconstruction says nothing of it."""
    found = run(
        "mae_weight_decay",
        root,
        seed=1,
        keep={
            "decay": {"mae": {}, "all_strong": {"param_groups": "all", "weight_decay": 1.0}},
            "init": ["mae", "transformers"],
        },
        train_num_samples=1024,
        batch_size=64,
        evaluations=[{"kind": "reconstruction", "every": 5}],
    )
    assert set(found) == {"", "all_strong", "transformers"}
    gaps = {level: last(trial, "recon_gap") for level, trial in found.items()}
    assert gaps["transformers"] < 0.5 * gaps[""], gaps
    assert gaps["all_strong"] == pytest.approx(gaps[""], rel=0.1)
    rates = sum(row["lr"] for row in found[""].trace() if row["step"] <= 50)
    scales = {level: last(trial, "ln_scale_min") for level, trial in found.items()}
    shrunk = scales["all_strong"] / scales[""]
    assert shrunk == pytest.approx(math.exp(-rates), abs=0.01), (scales, rates)


@pytest.mark.exhaustive
def test_an_autoencoder_that_cannot_learn_is_told(root: Path) -> None:
    """At a rate of nothing updates are named small, and the reconstruction is worse than predicting
    nothing. With every patch hidden the layer that reads them is dead, and a quarter is learnt of
    what the sound run learns, which has no flag."""
    found = run(
        "mae_weight_decay",
        root,
        seed=0,
        keep={"lr": [2e-3, 1e-9], "mask_ratio": [0.75, 1.0]},
        train_num_samples=1024,
        batch_size=64,
        epochs=10,
        evaluations=[{"kind": "reconstruction", "every": 10}],
    )
    told = {level: (trial.result(1) or {})["flags"] for level, trial in found.items()}
    gaps = {level: last(trial, "recon_gap") for level, trial in found.items()}
    patches = "DEAD_PARAM(vit.embeddings.patch_embeddings.projection.*)"
    assert told == {"": [], "1e-09": ["UPDATES_SMALL"], "1.0": [patches]}
    assert gaps["1e-09"] < 0 < gaps["1.0"] < 0.5 * gaps[""]


@pytest.mark.exhaustive
def test_uniform_assignments_leave_no_gap(root: Path) -> None:
    """The whole run of one seed with epsilon 1: the loss rests at ln(prototypes), so `loss_gap` is
    nothing; the sound run's is not."""
    found = run("swav_collapse", root, seed=1, keep={"epsilon": [0.03, 1.0]}, evaluations=[])
    gaps = {level: last(trial, "loss_gap") for level, trial in found.items()}
    assert abs(gaps["1.0"]) < 0.02 and gaps[""] > 0.1, gaps
    assert "PROTOTYPE_COLLAPSE" not in (found[""].result(1) or {})["flags"]


def test_the_best_loss_may_be_a_collapse(root: Path) -> None:
    """The baseline keeps its projections apart over most of the prototypes and is STABLE. With
    nothing balanced the loss is far better, with one prototype in use: COLLAPSED."""
    found = run(
        "swav_collapse",
        root,
        seed=0,
        keep={"sinkhorn_iterations": [3, 0]},
        epochs=2,
        train_num_samples=2560,
        evaluations=[{"kind": "knn", "train_path": "data/emoji-groups/train", "every": 2}],
    )
    sound, single = found[""], found["0"]
    assert last(sound, "projection_spread") > 0.4 and last(sound, "prototypes_used") > 8
    assert last(single, "loss") < 0.1 < 3 < last(sound, "loss")
    assert last(single, "prototypes_used") == 1 and last(single, "projection_spread") < 0.15
    results = [trial.result(1) or {} for trial in (sound, single)]
    assert [each["verdict"] for each in results] == ["STABLE", "COLLAPSED"]
    assert "PROTOTYPE_COLLAPSE" in results[1]["flags"]


@pytest.mark.exhaustive
def test_a_strong_augmentation_shows_in_the_score_and_a_stuck_temperature_in_a_marker(
    root: Path,
) -> None:
    """Three runs of openclip_markers: pictures that are cropped and coloured hard are found
    less than half as often; in pure_bf16 the temperature's updates round to nothing, which the
    score does not tell and the marker does."""
    prepare_emoji(root / "data" / "emoji")
    strong = yaml.safe_load((STUDIES / "openclip_markers.yaml").read_text())["factors"][
        "augmentation"
    ]
    found = run(
        "openclip_markers",
        root,
        seed=0,
        keep={"precision": ["fp32", "pure_bf16"], "augmentation": strong},
        epochs=4,
        zeroshot_frequency=4,
    )
    assert set(found) == {"", "pure_bf16", "strong"}
    scores = {level: last(trial, "imagenet_top5") for level, trial in found.items()}
    assert scores["strong"] < 0.6 * scores[""] and scores["pure_bf16"] > 0.6 * scores[""], scores
    told = {level: (trial.result(1) or {})["flags"] for level, trial in found.items()}
    assert "UPDATES_SMALL" in told["pure_bf16"] and not told[""] and not told["strong"]
    temperatures = [row["logit_scale"] for row in found["pure_bf16"].trace()]
    assert temperatures[-1] == temperatures[len(temperatures) // 2]


@pytest.mark.parametrize("name", [*HERE, *CLUSTER])
def test_studies_say_what_they_expect_and_plan_anywhere(name: str, tmp_path: Path) -> None:
    """Each is valid, its header has question, cost and expected sign, its hypothesis names levels,
    and the baseline has an outline without its data."""
    path = STUDIES / f"{name}.yaml"
    study = load_study(path)
    header = path.read_text().partition("recipe:")[0]
    assert "?" in header and "# Expected " in header and ("# Cost " in header or name in CLUSTER)
    assert "# Published " in header or name in HERE
    assert study.hypothesis and {each.expected for each in study.hypothesis} <= EXPECTED
    recipe = load(study.recipe)
    config = recipe.Config(**study.config(study.cell({}), seed=0))
    gang = study.gang.shape()
    found = recipe.outline(
        config, workers=gang.workers, gpus=int(gang.gpus_per_worker), root=tmp_path
    )
    assert study.objective.metric in found.measures
    assert found.steps or found.no_steps


EXPECTED = {"better", "worse", "equivalent"}


@pytest.mark.parametrize("name", CLUSTER)
def test_studies_of_a_cluster_are_forecast_here(name: str, tmp_path: Path) -> None:
    """With the throughput of a gang, a plan on a machine without data and GPUs says what all of it
    costs: every sample of every trial over that throughput, times the workers, at least."""
    text = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    if name == "timesformer_k400":
        text["baseline"]["epoch_clips"] = 240_000
    study = parse_study(yaml.safe_dump(text), path=f"{name}.yaml", root=tmp_path)
    found = plan(study, StudyRecord(tmp_path / "runs" / name), samples_per_s=1000.0, deep=False)
    assert len(found.trials) >= 12 and found.cost is not None
    recipe = load(study.recipe)
    config = recipe.Config(**study.config(study.cell({}), seed=0))
    gang = study.gang.shape()
    one = recipe.outline(config, workers=gang.workers, gpus=1, root=tmp_path)
    assert one.steps is not None and one.samples is not None
    least = len(found.trials) * one.steps * one.samples / 1000 * gang.workers / 3600
    assert least <= found.cost.worker_hours_p50 < 1.5 * least
