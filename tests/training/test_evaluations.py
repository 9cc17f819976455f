"""Evaluations: what each measures, on any data and number of ranks, and that training goes on."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import socket
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_trials import (
    CLASSES,
    PRELOADED,
    Ranks,
    config,
    draw,
    fields,
    run,
    write_pairs,
    write_trial,
)

from ablate.errors import DataError
from ablate.recipes import openclip
from ablate.records.answers import unpack, unpack_labels
from ablate.records.folder import TrialRecord
from ablate.testing import EvaluationContract
from ablate.training import ranks
from ablate.training.data.image_source import image_folder, labelled_shards
from ablate.training.evaluations import scores
from ablate.training.ranks import Gang
from ablate.training.task import Task
from ablate.trial import metrics
from ablate.trial.recipe import Role, absolute, describe, fields_of

ALONE = Gang(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Beside the small data: labelled shards with names and templates, and pairs, as `sets`."""
    folder = data / "sets"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(11)
    for number in range(2):
        labelled = [(draw(kind, rng), kind) for kind in (0, 1, 2, 3, 3, 2, 1)]
        write_labelled(folder / f"{number}.tar", labelled)
    (folder / "classnames.json").write_text(json.dumps(CLASSES))
    (folder / "templates.json").write_text(json.dumps(["a {}", "the {} here"]))
    kinds = [0, 1, 2, 3, 2, 1, 0]
    write_pairs(folder / "pairs.tar", [(draw(k, rng), f"a {CLASSES[k]}") for k in kinds])
    return folder


def write_labelled(path: Path, labelled: list[tuple[bytes, Any]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (image, label) in enumerate(labelled):
            for ending, content in (("jpg", image), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{path.stem}_{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


ALL = [
    {"kind": "knn", "neighbours": 5},
    {"kind": "knn", "name": "shards", "path": "sets/{0,1}.tar", "train_path": "val", "every": 2},
    {"kind": "linear", "path": "sets/{0,1}.tar"},
    {"kind": "linear", "name": "from-val", "path": "sets/{0,1}.tar", "train_path": "val"},
    {"kind": "zero_shot", "path": "sets/{0,1}.tar"},
    {"kind": "retrieval", "path": "sets/pairs.tar"},
]
MEASURED = {
    "imagenet_top1", "imagenet_top5", "knn_top1", "knn_top1/shards", "linear_top1",
    "linear_top1/from-val", "zero_shot_top1", "zero_shot_top5",
    *(f"retrieval_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)),
}  # fmt: skip


def build(data: Path, **changes: Any) -> Task:
    chosen = absolute(config(**changes), root=data)
    return openclip.build(chosen, rank=0, world_size=1, device=torch.device("cpu"))


def test_every_measurement_is_declared(data: Path, sets: Path) -> None:
    """What evaluations give is what the configuration says they do, and each name has a meaning."""
    task = build(data, evaluations=ALL)
    names = [evaluation.name for evaluation in task.evaluations]
    assert names == [
        "zero_shot", "knn+linear+linear/from-val", "knn/shards", "zero_shot", "retrieval", "health",
    ]  # fmt: skip
    task.learner.model.eval()
    told = {n for each in task.evaluations for n in each.run(task.learner.model, ALONE)}
    declared = (*openclip.metrics(config(evaluations=ALL)), *metrics.METRICS.values())
    assert [name for name in told if describe(declared, name) is None] == []
    assert told >= MEASURED == set(openclip.measures(config(evaluations=ALL)))


class OfTheTask(EvaluationContract):
    """One of a task's evaluations."""

    place: ClassVar[int]

    @pytest.fixture(autouse=True)
    def _placed(self, data: Path, sets: Path) -> None:
        self._data = data

    def evaluated(self, tmp_path: Path) -> tuple[Any, torch.nn.Module]:
        task = build(self._data, evaluations=ALL)
        return task.evaluations[self.place], task.learner.model


class TestZeroShot(OfTheTask):
    place, measures = 0, ("imagenet_top1", "imagenet_top5")


class TestOnFeatures(OfTheTask):
    place, measures = 1, ("knn_top1", "linear_top1", "linear_top1/from-val")


class TestRetrieval(OfTheTask):
    place, measures = 4, ("retrieval_i2t_r1", "retrieval_t2i_r10")


class TestHealth(OfTheTask):
    place, measures = 5, ("params_non_finite",)


def test_features_of_a_set_are_computed_once(data: Path, sets: Path) -> None:
    """Neighbours and probes of one schedule share them; the next run of another model has its own,
    and each measures what it measures alone."""
    task = build(data, evaluations=ALL)
    task.learner.model.eval()
    computed: list[int] = []

    def count(module: Any, given: Any) -> None:
        computed.append(len(given[0]))

    task.learner.model.visual.register_forward_pre_hook(count)
    together, later = task.evaluations[1], task.evaluations[2]
    first = together.run(task.learner.model, ALONE)
    assert sorted(computed) == [12, 14]  # val, and the shards
    later.run(task.learner.model, ALONE)
    assert sorted(computed) == [12, 12, 14, 14]
    alone: dict[str, float] = {}
    for number, spec in enumerate(ALL):
        if spec["kind"] in ("knn", "linear") and "every" not in spec:
            single = build(data, evaluations=[ALL[number]]).evaluations[1]
            alone |= single.run(task.learner.model, ALONE)
    names = ["knn_top1", "linear_top1", "linear_top1/from-val"]
    assert [first[name] for name in names] == [alone[name] for name in names]
    with torch.no_grad():
        for p in task.learner.model.parameters():
            p.copy_(torch.randn_like(p))
    computed.clear()
    assert together.run(task.learner.model, ALONE)["linear_top1"] != first["linear_top1"]
    assert sorted(computed) == [12, 14]


@pytest.mark.exhaustive
def test_measuring_more_changes_no_training(tmp_path: Path, data: Path, sets: Path) -> None:
    """With and without evaluations every loss has the same bits; each runs on its schedule."""
    plain = write_trial(tmp_path / "plain", data, epochs=3, zeroshot_frequency=0)
    much = write_trial(tmp_path / "much", data, epochs=3, evaluations=ALL)
    assert run(plain.folder) == [0] and run(much.folder) == [0]
    assert [row["loss"].hex() for row in much.trace()] == [
        row["loss"].hex() for row in plain.trace()
    ]
    check_answers(much)
    rows = {row["step"]: row for row in much.evaluations()}
    assert sorted(rows) == [6, 12, 18]
    assert ["knn_top1/shards" in rows[step] for step in sorted(rows)] == [False, True, True]
    result = much.result(1)
    assert result is not None and set(result["final"]) >= MEASURED


def check_answers(trial: TrialRecord) -> None:
    """Of each evaluation one bit an image is kept, whose share is the accuracy itself."""
    rows = {row["step"]: row for row in trial.evaluations()}
    told = {row["step"]: row["of"]["imagenet_top1"] for row in trial.answers()}
    assert set(told) == {step for step, row in rows.items() if "imagenet_top1" in row} != set()
    for step, found in told.items():
        right = unpack(found["right"], found["images"])
        assert right.mean() == rows[step]["imagenet_top1"]
    labels = [unpack_labels(found["labels"]) for found in told.values() if "labels" in found]
    assert labels and len(labels[0]) == rows[max(rows)]["eval_images"]


def _measure_as_rank(folder: str, data: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    gang = ranks.join(gpus_per_worker=0)
    task = build(Path(data), evaluations=ALL)
    task.learner.model.eval()
    measured: dict[str, float] = {}
    for evaluation in task.evaluations[:-1]:
        measured.update(evaluation.run(task.learner.model, gang))
    (Path(folder) / f"rank-{gang.rank}.json").write_text(json.dumps(measured))
    ranks.leave()


def test_ranks_share_the_work_and_agree(tmp_path: Path, data: Path, sets: Path) -> None:
    """Three ranks, among which nothing divides evenly, measure what one rank measures."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = str(listening.getsockname()[1])
    listening.close()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    common = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common["ABLATE_CACHE"] = os.environ["ABLATE_CACHE"]
    processes = []
    for rank in range(3):
        env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(
            context.Process(target=_measure_as_rank, args=(str(tmp_path), str(data), env))
        )
        processes[-1].start()
    assert Ranks(tuple(processes)).wait() == [0, 0, 0]
    alone: dict[str, float] = {}
    task = build(data, evaluations=ALL)
    task.learner.model.eval()
    for evaluation in task.evaluations[:-1]:
        alone.update(evaluation.run(task.learner.model, ALONE))
    for rank in range(3):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert {n: found[n] for n in MEASURED} == {n: alone[n] for n in MEASURED}


@pytest.mark.exhaustive
def test_wrong_batch_norm_statistics_are_told_from_wrong_weights(
    tmp_path: Path, data: Path
) -> None:
    """A trained model whose running statistics were spoilt: fresh ones bring the accuracy back,
    the marker blames the statistics, and the spoilt ones are back to the bit. The sound model is
    not asked."""
    from ablate.markers import Context, Monitor

    trial = write_trial(tmp_path / "t", data, epochs=10, zeroshot_frequency=10)
    assert run(trial.folder) == [0]
    task = build(data)
    weights = trial.folder / "checkpoints" / "step-000060" / "model.safetensors"
    task.learner.model.load_state_dict(safetensors.torch.load_file(weights))
    task.learner.model.eval()
    zero_shot, health = task.evaluations
    sound = {**zero_shot.run(task.learner.model, ALONE), **health.run(task.learner.model, ALONE)}
    assert sound["imagenet_top1"] > 0.6 and "recalibrated_top1" not in sound
    for name, buffer in task.learner.model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(40)
    before = {name: value.clone() for name, value in task.learner.model.state_dict().items()}
    spoilt = {**zero_shot.run(task.learner.model, ALONE), **health.run(task.learner.model, ALONE)}
    assert spoilt["recalibrated_top1"] > 1.5 * spoilt["imagenet_top1"]
    after = task.learner.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module.training for module in task.learner.model.modules())
    told = Monitor(context=Context(accuracy="imagenet_top1")).evaluate({"step": 60, **spoilt})
    assert [e.evidence["fault"] for e in told if e.marker == "batch_norm"] == ["statistics"]


def test_a_study_may_be_judged_by_any_of_them(data: Path, sets: Path) -> None:
    """Objectives, chance levels and the refusal of an objective that nothing measures."""
    from ablate.runner.plan.outlines import refuse_unmeasured
    from ablate.study import Objective

    chosen = config(evaluations=ALL)
    for name in MEASURED:
        assert Objective(metric=name).metric == name
        assert 0 < openclip.chance(chosen, root=data, metric=name) <= 1
    levels = {"knn_top1/shards": 1 / 4, "zero_shot_top5": 1.0, "retrieval_t2i_r5": 5 / 7}
    for name, level in levels.items():
        assert openclip.chance(chosen, root=data, metric=name) == pytest.approx(level)
    assert openclip.chance(config(), root=data, metric="knn_top1") == 0
    assert describe(openclip.metrics(chosen), "knn_top2/shards") is None
    study: Any = SimpleNamespace(objective=Objective(metric="knn_top1"))
    refuse_unmeasured(study, openclip.measures(chosen))
    with pytest.raises(ValueError, match="gives imagenet_top1.*Add the evaluation"):
        refuse_unmeasured(study, openclip.measures(config()))


def test_data_that_are_reported_choose_no_evaluation(data: Path, sets: Path) -> None:
    """By measurements on the same images the best of what is reported would be reported; so would
    by one that nothing measures. An average of more evaluations than there are is refused too."""
    from ablate.runner.plan.outlines import refuse_same_data
    from ablate.study import Objective

    outline = openclip.outline(
        config(evaluations=ALL, zeroshot_frequency=1, epochs=3), workers=1, gpus=0, root=data
    )

    def check(**goal: Any) -> None:
        study: Any = SimpleNamespace(objective=Objective(metric="imagenet_top1", **goal))
        refuse_same_data(study, outline)

    by = {"at": "best_by_heldout"}
    check(**by, heldout="zero_shot_top1")
    for same in ("imagenet_top5", "knn_top1"):
        with pytest.raises(ValueError, match=f"heldout {same} is measured on"):
            check(**by, heldout=same)
    with pytest.raises(ValueError, match="is not measured"):
        check(**by, heldout="knn_top1/other")
    check(at="mean_last_k", k=outline.evaluations)
    with pytest.raises(ValueError, match="evaluate more often"):
        check(at="mean_last_k", k=outline.evaluations + 1)


def test_evaluations_belong_to_the_experiment_and_not_to_the_peers_command() -> None:
    """They change a trial's id; the exported command trains the same."""
    from ablate.trial.identity import identify

    plain, more = config(), config(evaluations=[{"kind": "knn"}])
    ids = {
        identify("openclip", c.model_dump(mode="json"), workers=1,
                 not_identity=fields_of(openclip.Config, Role.FREE))
        for c in (plain, more)
    }  # fmt: skip
    assert len(ids) == 2
    assert openclip.command(plain, workers=1) == openclip.command(more, workers=1)
    assert openclip.Config(**more.model_dump(mode="json")) == more


@pytest.mark.parametrize(
    ("evaluations", "says"),
    [
        ([{"kind": "knn"}, {"kind": "knn"}], "two evaluations measure knn_top1"),
        ([{"kind": "zero_shot"}], "imagenet_val is evaluated by itself"),
        ([{"kind": "retrieval", "path": "val"}], "shards of images and captions"),
        ([{"kind": "knn", "neighbors": 3}], "neighbors"),
        ([{"kind": "cluster"}], "'knn'"),
    ],
)
def test_unclear_evaluations_are_refused(evaluations: list[Any], says: str) -> None:
    """Two of a name, no data, unknown kinds and options."""
    with pytest.raises(ValidationError, match=says):
        config(evaluations=evaluations)


def test_an_evaluation_without_data_is_refused() -> None:
    """Neither a path nor imagenet_val."""
    with pytest.raises(ValidationError, match="evaluation of knn_top1 has no data"):
        openclip.Config(**fields(imagenet_val=None, evaluations=[{"kind": "knn"}]))


def test_shards_and_folder_of_the_same_images_measure_the_same(tmp_path: Path, data: Path) -> None:
    """Zero-shot accuracy does not depend on how labelled images are stored."""
    source = image_folder(data / "val")
    images = [(source.read(i), int(source.labels[i])) for i in range(len(source))]
    write_labelled(tmp_path / "val.tar", images)
    for name in ("classnames.json", "templates.json"):
        (tmp_path / name).write_bytes((data / "val" / name).read_bytes())
    task = build(data, evaluations=[{"kind": "zero_shot", "path": str(tmp_path / "val.tar")}])
    folder, shards, _ = task.evaluations
    task.learner.model.eval()
    one, two = folder.run(task.learner.model, ALONE), shards.run(task.learner.model, ALONE)
    assert one["imagenet_top1"] == two["zero_shot_top1"]
    assert one["imagenet_top5"] == two["zero_shot_top5"]


def test_bad_labelled_shards_say_what_is_wrong(tmp_path: Path, data: Path) -> None:
    """No class, no number, no archive, a number without a name."""
    image = draw(0, np.random.default_rng(0))
    write_pairs(tmp_path / "pairs.tar", [(image, "a red square")])
    with pytest.raises(DataError, match="pairs00000 has jpg, txt; a labelled sample is"):
        labelled_shards(str(tmp_path / "pairs.tar"))
    write_labelled(tmp_path / "word.tar", [(image, "cat")])
    with pytest.raises(DataError, match="word_0.cls holds b'cat', which is no class number"):
        labelled_shards(str(tmp_path / "word.tar"))
    (tmp_path / "torn.tar").write_bytes(b"x" * 700)
    with pytest.raises(DataError, match=r"torn.tar cannot be read"):
        labelled_shards(str(tmp_path / "torn.tar"))
    write_labelled(tmp_path / "far.tar", [(image, 1000)])
    with pytest.raises(
        DataError, match="1 different class numbers, 1000 to 1000, and no classnames.json"
    ):
        build(data, evaluations=[{"kind": "zero_shot", "path": str(tmp_path / "far.tar")}])


def clusters(spread: float, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """600 points around 6 centres in 24 dimensions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(6, size=600)
    centres = 3 * np.random.default_rng(9).normal(size=(6, 24)) / np.sqrt(24)
    points = (centres[labels] + spread * rng.normal(size=(600, 24))).astype(np.float32)
    return torch.from_numpy(points), torch.from_numpy(labels)


@pytest.mark.parametrize("score", [scores.knn_correct, scores.linear_correct])
def test_neighbours_and_probes_find_classes(score: Any) -> None:
    """Separated classes score one, features without classes chance; also on another set."""
    good = score(*clusters(0.05))
    assert good.double().mean() > 0.99
    assert score(*clusters(0.05, seed=1), reference=clusters(0.05)).double().mean() > 0.99
    interval = scores.bootstrap(score(*clusters(50.0)))
    assert interval.low < 1 / 6 + 0.05 and interval.value < 0.3


def test_neighbours_are_sklearns() -> None:
    """With one neighbour, and with votes that hardly differ, as scikit-learn's classifier."""
    sklearn = pytest.importorskip("sklearn.neighbors")
    (x, y), (bank, target) = clusters(1.0, seed=1), clusters(1.0)
    for k, weights in ((1, "uniform"), (25, lambda d: np.exp((1 - d) / 0.1))):
        theirs = sklearn.KNeighborsClassifier(k, metric="cosine", weights=weights)
        found = theirs.fit(bank.numpy(), target.numpy()).predict(x.numpy()) == y.numpy()
        ours = scores.knn_correct(x, y, reference=(bank, target), neighbours=k)
        assert (ours.numpy() == found).mean() > 0.995


def test_a_probe_is_fitted_to_half_of_each_class() -> None:
    """Every class has half of its samples on either side, and the seed decides which."""
    _, labels = clusters(1.0)
    train = scores.halves(labels, seed=0)
    counts, chosen = torch.bincount(labels), torch.bincount(labels[train])
    assert torch.equal(chosen, counts // 2)
    assert not torch.equal(train, scores.halves(labels, seed=1))


def test_recalls_count_positions_and_share_ties() -> None:
    """The place of the own target counts; equal targets share the places they fill."""
    texts = torch.eye(20)
    images = texts.clone()
    images[3] = texts[4] + 0.5 * texts[3]  # its own caption comes second
    found = scores.recalls(images, texts)
    assert found[3].tolist() == [0, 1, 1] and found[:, 0].sum() == 19
    assert torch.equal(scores.recalls(images, texts, rows=slice(2, 5)), found[2:5])
    collapsed = scores.recalls(torch.ones(20, 4), torch.ones(20, 4)).mean(dim=0)
    assert collapsed.tolist() == pytest.approx([1 / 20, 5 / 20, 10 / 20])


@settings(max_examples=30)
@given(st.integers(2, 60), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([8, 512]))
def test_recalls_do_not_hang_on_rounding(pairs: int, kinds: int, seed: int, width: int) -> None:
    """Pairs of a few kinds, each copy rounded another way as by another batch shape or processor:
    recalls are those of exact copies, however the queries are cut."""
    rng = np.random.default_rng(seed)
    drawn = torch.from_numpy(rng.standard_normal((2, kinds, width)))
    exact = torch.nn.functional.normalize(drawn, dim=2)[:, rng.integers(kinds, size=pairs)]
    noise = torch.from_numpy(rng.uniform(-1, 1, exact.shape)) * 2.0**-23
    images, texts = (exact * (1 + noise)).float()
    truth = scores.recalls(*exact)
    assert torch.equal(scores.recalls(images, texts), truth)
    middle = pairs // 2
    parts = [
        scores.recalls(images, texts, rows=slice(*cut)) for cut in ((0, middle), (middle, pairs))
    ]
    assert torch.equal(torch.cat(parts), truth)


def test_features_that_are_not_finite_find_nothing() -> None:
    """A model that gives NaN has no pair, no neighbour: it does not score one."""
    broken = torch.full((10, 4), torch.nan)
    assert scores.recalls(broken, broken).sum() == 0
    assert not scores.knn_correct(broken, torch.zeros(10, dtype=torch.int64)).any()


def test_gains_are_judged_on_the_same_images() -> None:
    """A rise by wins alone is sure where two separate intervals overlap; no change is none."""
    before = torch.arange(200) < 100
    after = torch.arange(200) < 112
    apart = scores.bootstrap(before), scores.bootstrap(after)
    assert apart[0].high > apart[1].low
    paired = scores.gain(before, after)
    assert paired.value == pytest.approx(0.06) and 0.02 < paired.low < 0.06 < paired.high
    none = scores.gain(before, before)
    assert (none.value, none.low, none.high) == (0, 0, 0)
