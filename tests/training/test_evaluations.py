"""Evaluations: what each measures, on any data and number of ranks, and that training goes on."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import socket
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
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

from ablate import metrics, recipes
from ablate.errors import DataError
from ablate.recipes import openclip
from ablate.training import distributed, evaluate, scores
from ablate.training.distributed import Gang

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


def build(data: Path, **changes: Any) -> recipes.Task:
    chosen = recipes.absolute(config(**changes), openclip.PATH_FIELDS, root=data)
    return openclip.build(chosen, rank=0, world_size=1, device=torch.device("cpu"))


def test_every_evaluation_keeps_the_contract(data: Path, sets: Path) -> None:
    """Each gives the same declared, finite numbers twice, and touches neither model nor
    generators."""
    task = build(data, evaluations=ALL)
    names = [evaluation.name for evaluation in task.evaluations]
    assert names == [
        "zero_shot", "knn+linear+linear/from-val", "knn/shards", "zero_shot", "retrieval", "health",
    ]  # fmt: skip
    task.model.eval()
    told: set[str] = set()
    for evaluation in task.evaluations:
        state = {name: value.clone() for name, value in task.model.state_dict().items()}
        modes = [module.training for module in task.model.modules()]
        drawn = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        first = evaluation.run(task.model, ALONE)
        again = evaluation.run(task.model, ALONE)
        assert {n: v for n, v in first.items() if "time" not in n} == {
            n: v for n, v in again.items() if "time" not in n
        }
        assert all(metrics.describe(name) is not None for name in first)
        assert all(type(v) is float and np.isfinite(v) for v in first.values()), first
        assert torch.equal(torch.get_rng_state(), drawn[0])
        assert np.random.get_state()[1].tolist() == drawn[1] and random.getstate() == drawn[2]
        after = task.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in state.items())
        assert [module.training for module in task.model.modules()] == modes
        assert all(p.grad is None and p.requires_grad for p in task.model.parameters())
        told |= set(first)
    assert told >= MEASURED == set(openclip.measures(config(evaluations=ALL)))


def test_features_of_a_set_are_computed_once(
    data: Path, sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours and probes of one schedule share them; the next run of another model has its own,
    and each measures what it measures alone."""
    task = build(data, evaluations=ALL)
    task.model.eval()
    computed: list[Any] = []
    compute = evaluate.image_features

    def count(model: Any, images: Any, encoder: Any, gang: Any) -> torch.Tensor:
        computed.append(images)
        return compute(model, images, encoder, gang)

    monkeypatch.setattr(evaluate, "image_features", count)
    together, later = task.evaluations[1], task.evaluations[2]
    first = together.run(task.model, ALONE)
    assert len(computed) == 2 == len(set(map(id, computed)))  # val, and the shards
    later.run(task.model, ALONE)
    assert len(set(map(id, computed))) == 2, "another schedule reads the same images"
    alone: dict[str, float] = {}
    for number, spec in enumerate(ALL):
        if spec["kind"] in ("knn", "linear") and "every" not in spec:
            single = build(data, evaluations=[ALL[number]]).evaluations[1]
            alone |= single.run(task.model, ALONE)
    names = ["knn_top1", "linear_top1", "linear_top1/from-val"]
    assert [first[name] for name in names] == [alone[name] for name in names]
    with torch.no_grad():
        for p in task.model.parameters():
            p.copy_(torch.randn_like(p))
    before = len(computed)
    assert together.run(task.model, ALONE)["linear_top1"] != first["linear_top1"]
    assert len(computed) == before + 2


def test_measuring_more_changes_no_training(tmp_path: Path, data: Path, sets: Path) -> None:
    """With and without evaluations every loss has the same bits; each runs on its schedule."""
    plain = write_trial(tmp_path / "plain", data, epochs=3, zeroshot_frequency=0)
    much = write_trial(tmp_path / "much", data, epochs=3, evaluations=ALL)
    assert run(plain.folder) == [0] and run(much.folder) == [0]
    assert [row["loss"].hex() for row in much.trace()] == [
        row["loss"].hex() for row in plain.trace()
    ]
    rows = {row["step"]: row for row in much.evaluations()}
    assert sorted(rows) == [6, 12, 18]
    assert ["knn_top1/shards" in rows[step] for step in sorted(rows)] == [False, True, True]
    result = much.result(1)
    assert result is not None and set(result["final"]) >= MEASURED


def _measure_as_rank(folder: str, data: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    gang = distributed.join(gpus_per_worker=0)
    task = build(Path(data), evaluations=ALL)
    task.model.eval()
    measured: dict[str, float] = {}
    for evaluation in task.evaluations[:-1]:
        measured.update(evaluation.run(task.model, gang))
    (Path(folder) / f"rank-{gang.rank}.json").write_text(json.dumps(measured))
    distributed.leave()


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
    task.model.eval()
    for evaluation in task.evaluations[:-1]:
        alone.update(evaluation.run(task.model, ALONE))
    for rank in range(3):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert {n: found[n] for n in MEASURED} == {n: alone[n] for n in MEASURED}


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
    task.model.load_state_dict(safetensors.torch.load_file(weights))
    task.model.eval()
    zero_shot, health = task.evaluations
    sound = {**zero_shot.run(task.model, ALONE), **health.run(task.model, ALONE)}
    assert sound["imagenet_top1"] > 0.6 and "recalibrated_top1" not in sound
    for name, buffer in task.model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(40)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    spoilt = {**zero_shot.run(task.model, ALONE), **health.run(task.model, ALONE)}
    assert spoilt["recalibrated_top1"] > 1.5 * spoilt["imagenet_top1"]
    after = task.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module.training for module in task.model.modules())
    told = Monitor(context=Context()).evaluate({"step": 60, **spoilt})
    assert [e.evidence["fault"] for e in told if e.marker == "batch_norm"] == ["statistics"]


def test_a_study_may_be_judged_by_any_of_them(data: Path, sets: Path) -> None:
    """Objectives, chance levels and the refusal of an objective that nothing measures."""
    from ablate.forecast import _refuse_unmeasured
    from ablate.study import Objective

    chosen = config(evaluations=ALL)
    for name in MEASURED:
        assert Objective(metric=name).metric == name
        assert 0 < openclip.chance(chosen, root=data, metric=name) <= 1
    levels = {"knn_top1/shards": 1 / 4, "zero_shot_top5": 1.0, "retrieval_t2i_r5": 5 / 7}
    for name, level in levels.items():
        assert openclip.chance(chosen, root=data, metric=name) == pytest.approx(level)
    assert openclip.chance(config(), root=data, metric="knn_top1") == 0
    with pytest.raises(ValueError, match="not known"):
        Objective(metric="knn_top2/shards")
    _refuse_unmeasured("knn_top1", openclip.measures(chosen))
    with pytest.raises(ValueError, match="gives imagenet_top1.*add the evaluation"):
        _refuse_unmeasured("knn_top1", openclip.measures(config()))


def test_evaluations_belong_to_the_experiment_and_not_to_the_peers_command() -> None:
    """They change a trial's id; the exported command trains the same."""
    from ablate.trial import identify

    plain, more = config(), config(evaluations=[{"kind": "knn"}])
    ids = {
        identify("openclip", c.model_dump(mode="json"), workers=1,
                 not_identity=openclip.NOT_IDENTITY)
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
    with pytest.raises(ValidationError, match="evaluation knn has no data"):
        openclip.Config(**fields(imagenet_val=None, evaluations=[{"kind": "knn"}]))


def test_shards_and_folder_of_the_same_images_measure_the_same(tmp_path: Path, data: Path) -> None:
    """Zero-shot accuracy does not depend on how labelled images are stored."""
    source = evaluate.image_folder(data / "val")
    images = [(source.read(i), int(source.labels[i])) for i in range(len(source))]
    write_labelled(tmp_path / "val.tar", images)
    for name in ("classnames.json", "templates.json"):
        (tmp_path / name).write_bytes((data / "val" / name).read_bytes())
    task = build(data, evaluations=[{"kind": "zero_shot", "path": str(tmp_path / "val.tar")}])
    folder, shards, _ = task.evaluations
    task.model.eval()
    one, two = folder.run(task.model, ALONE), shards.run(task.model, ALONE)
    assert one["imagenet_top1"] == two["zero_shot_top1"]
    assert one["imagenet_top5"] == two["zero_shot_top5"]


def test_bad_labelled_shards_say_what_is_wrong(tmp_path: Path, data: Path) -> None:
    """No class, no number, no archive, a number without a name."""
    image = draw(0, np.random.default_rng(0))
    write_pairs(tmp_path / "pairs.tar", [(image, "a red square")])
    with pytest.raises(DataError, match="pairs00000 has jpg, txt; a labelled sample is"):
        evaluate.labelled_shards(str(tmp_path / "pairs.tar"))
    write_labelled(tmp_path / "word.tar", [(image, "cat")])
    with pytest.raises(DataError, match="word_0.cls holds b'cat', which is no class number"):
        evaluate.labelled_shards(str(tmp_path / "word.tar"))
    (tmp_path / "torn.tar").write_bytes(b"x" * 700)
    with pytest.raises(DataError, match=r"torn.tar cannot be read"):
        evaluate.labelled_shards(str(tmp_path / "torn.tar"))
    write_labelled(tmp_path / "far.tar", [(image, 1000)])
    with pytest.raises(DataError, match="class number 1000, and ImageNet names 1000"):
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
    train = scores._halves(labels, seed=0)
    counts, chosen = torch.bincount(labels), torch.bincount(labels[train])
    assert torch.equal(chosen, counts // 2)
    assert not torch.equal(train, scores._halves(labels, seed=1))


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
