"""What is certain before a step is taken is said before it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_trials import config, draw, write_pairs
from tars import write_tar

from ablate.errors import DataError
from ablate.recipes import openclip
from ablate.recipes.openclip.certain import check_data
from ablate.recipes.openclip.classes import refuse_other_labels, zero_shot_classes
from ablate.trial.recipe import absolute


@pytest.mark.parametrize(
    ("changes", "workers", "steps", "says"),
    [
        ({"batch_size": 16, "accum_freq": 8}, 1, 0, "no whole step of 128 samples"),
        ({"batch_size": 1}, 1, 96, "loss and gradient are always 0"),
        ({"model": "coca_ViT-B-32"}, 1, None, "learns to write captions"),
        ({"model": "local-dir:out/best"}, 1, None, "weights as init_from"),
        ({"model": "hf-hub:org/model"}, 1, None, "weights as init_from"),
        ({"force_patch_dropout": 0.5}, 1, None, "does nothing with tiny-rn-a, a ResNet"),
        ({"image_interpolation": "random"}, 1, None, "does nothing without aug_cfg.use_timm"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], workers: int, steps: int | None, says: str
) -> None:
    """No step, a loss that is always 0, a loss we lack, weights unnamed, settings without use."""
    with pytest.raises(ValueError, match=says):
        openclip.check(config(**changes), workers=workers, gpus=0, steps=steps)


@pytest.mark.parametrize(
    ("changes", "workers"),
    [
        ({"batch_size": 1}, 2),
        ({"batch_size": 1, "accum_freq": 2}, 1),
        ({"batch_size": 1, "siglip": True}, 1),
        ({"model": "ViT-B-32", "force_patch_dropout": 0.5}, 1),
        ({"image_interpolation": "random", "aug_cfg": {"use_timm": True}}, 1),
    ],
)
def test_their_neighbours_may_be(changes: dict[str, Any], workers: int) -> None:
    """What is no pair alone, and what has an effect, passes."""
    openclip.check(config(**changes), workers=workers, gpus=0, steps=12)


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"opt": "timm/sgd", "beta1": 0.5, "beta2": 0.5}, "beta1 and beta2"),
        ({"opt": "timm/lion", "eps": 1e-3}, "eps"),
        ({"opt": "timm/adamw", "momentum": 0.1, "eps": 1e-8}, "momentum"),
        ({"opt": "timm/sgd", "momentum": 0.5}, None),
        ({"opt": "timm/adamw", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}, None),
    ],
)
def test_a_setting_that_an_optimizer_ignores_is_refused(
    changes: dict[str, Any], idle: str | None
) -> None:
    """Its levels would be the same run twice, and read as "no effect"."""
    chosen = config(**{"beta2": None, "eps": None, **changes})
    if idle is None:
        openclip.sketch(chosen)
    else:
        with pytest.raises(ValueError, match=f"takes no notice of {idle}"):
            openclip.sketch(chosen)


def placed(folder: Path, **changes: Any) -> Any:
    return absolute(config(**changes), root=folder)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_amounts_of_data_are_compared_with_a_step(data: Path) -> None:
    """A step that holds pairs twice and an epoch that repeats the set are told, others not."""
    assert check_data(placed(data), workers=1) == []
    assert check_data(placed(data, train_num_samples=90), workers=1) == []
    [large] = check_data(placed(data, batch_size=128), workers=1)
    assert "a step of 128 samples is larger than the 96 of train_data: 32 pairs" in large
    [often] = check_data(placed(data, train_num_samples=960), workers=1)
    assert "passes 10 times over the 96 samples" in often


def test_pictures_that_show_nothing_are_told(tmp_path: Path) -> None:
    """16 bits of grey, which decode to white as in open_clip; one colour; other pictures pass."""
    rng = np.random.default_rng(0)
    grey = png(rng.integers(300, 65535, (40, 40)).astype(np.uint16))
    (tmp_path / "train").mkdir()
    shard = tmp_path / "train" / "00000.tar"
    write_pairs(shard, [(draw(0, rng), "a"), *[(grey, "b")] * 3])
    one = {"train_data": "train/00000.tar", "imagenet_val": None, "batch_size": 2}
    sixteen, flat = check_data(placed(tmp_path, **one), workers=1)
    assert "3 of 4 images of train_data: an image with 16 bits of grey" in sixteen
    assert "3 of 4 pictures of train_data that were looked at are of one colour" in flat


def test_captions_that_are_no_utf8_are_told_with_their_place(tmp_path: Path) -> None:
    """Every one of them: an error that names sample and byte; a few: left out and counted."""
    image = draw(0, np.random.default_rng(0))
    members = [
        member
        for number in range(10)
        for member in (
            (f"{number:06d}.jpg", image),
            (f"{number:06d}.txt", "caf\u00e9".encode("latin-1" if number < 2 else "utf-8")),
        )
    ]
    (tmp_path / "train").mkdir()
    one = {"train_data": "train/few.tar", "imagenet_val": None, "batch_size": 2}
    write_tar(tmp_path / "train" / "few.tar", members)
    with pytest.raises(DataError, match=r"2 of 10 samples .*\(000000, byte 0xe9 at 3.*as UTF-8$"):
        check_data(placed(tmp_path, **one), workers=1)
    [told] = check_data(placed(tmp_path, max_fault_share=0.5, **one), workers=1)
    assert told == "2 samples of train_data are left out (2 x caption_not_utf8)"
    write_tar(tmp_path / "train" / "all.tar", members[:4])
    with pytest.raises(DataError, match="(?s)no usable sample.*whose caption is not UTF-8"):
        check_data(placed(tmp_path, **{**one, "train_data": "train/all.tar"}), workers=1)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("train/*.tar", r"write the range, as in \{00000..00575\}.tar"),
        ("train/0.tar train/1.tar", "join them with ::"),
        ("train/0.tar,train/1.tar", "join them with ::"),
    ],
)
def test_patterns_of_other_tools_are_refused(tmp_path: Path, pattern: str, says: str) -> None:
    """What a shell would expand, and lists with blanks or commas."""
    with pytest.raises(ValueError, match=says):
        openclip.check(config(train_data=pattern), workers=1, gpus=0)


def folders(root: Path, names: list[str], **files: Any) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / f"{name}.json").write_text(text)
    return root


@pytest.mark.parametrize(
    ("names", "files", "says"),
    [
        (["a", "b"], {"classnames": {"0": "x", "1": "y"}}, "holds a mapping"),
        (["a", "b"], {"classnames": '["x",\n "y",]'}, "line 2.*must be JSON"),
        (["a", "b"], {"templates": "a {}"}, "must be JSON"),
        (["a", "b"], {"templates": '"a {}"'}, "must hold a list of texts"),
        ([str(n) for n in range(12)], {"classnames": list("abcdefghijkl")}, "11 comes before 2"),
        ([f"{n:02d}" for n in range(12)], {"classnames": list("abcdefghijkl")}, None),
        ([f"n{n:08d}" for n in range(1000)], None, None),
        ([f"{n:04d}" for n in range(1000)], None, None),
        ([f"{n:04d}" for n in range(1, 1001)], None, "neither WordNet's ids.*nor 0000 to 0999"),
        ([str(n) for n in range(1, 1001)], None, "as texts, in which 1000 comes before 101"),
        ([f"class {n:04d}" for n in range(1000)], None, "neither WordNet's ids"),
    ],
)
def test_class_names_and_folders_that_do_not_fit_are_refused(
    tmp_path: Path, names: list[str], files: dict[str, Any] | None, says: str | None
) -> None:
    """Names that are no list, no JSON, or would be put on other classes; the right ones pass."""
    if files is not None:
        files = {"classnames": ["x", "y"], "templates": ["a {}"], **files}
    root = folders(tmp_path / "val", names, **(files or {}))
    if says is None:
        zero_shot_classes(root)
    else:
        with pytest.raises(DataError, match=says):
            zero_shot_classes(root)


@given(st.sets(st.integers(0, 1500), min_size=1, max_size=1000))
@settings(max_examples=30)
def test_labels_of_other_sets_are_not_imagenets(labels: set[int]) -> None:
    """Shards without names of their own are ImageNet's where nearly all its classes occur."""
    if len(labels) < 900:
        with pytest.raises(DataError, match=f"has {len(labels)} different class numbers"):
            refuse_other_labels("val.tar", labels)
    else:
        refuse_other_labels("val.tar", labels)


def test_classes_that_were_not_learnt_are_refused_before_a_step(tmp_path: Path) -> None:
    """Of neighbours and probes, by the names of the folders."""
    folders(tmp_path / "val", ["a", "d"])
    folders(tmp_path / "more", ["a", "b", "c"])
    spec = {"kind": "knn", "path": "val", "train_path": "more"}
    (tmp_path / "train").mkdir()
    write_pairs(tmp_path / "train" / "0.tar", [(draw(0, np.random.default_rng(0)), "a")] * 16)
    given = {"train_data": "train/0.tar", "imagenet_val": None}
    with pytest.raises(DataError, match=r"1 of 2 classes of .*val are no folder of .*more \(d\)"):
        check_data(placed(tmp_path, evaluations=[spec], **given), workers=1)
    spec["path"], spec["train_path"] = "more", "nowhere"
    assert check_data(placed(tmp_path, evaluations=[spec], **given), workers=1) == []


def test_a_csv_of_pictures_is_told_how_it_becomes_shards() -> None:
    """As a kind, as an ending, and where the kind is said but the shards are there."""
    from ablate.recipes.openclip.config import Config

    for settings_given in (
        {"train_data": "train.csv"},
        {"train_data": "train.csv", "dataset_type": "csv"},
        {"train_data": "train.tar", "dataset_type": "csv"},
    ):
        with pytest.raises(ValueError, match="ablate data pack LIST FOLDER"):
            Config(model="RN50", **settings_given)
