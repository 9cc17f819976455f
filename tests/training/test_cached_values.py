"""What decides a cached value is in its key: the cache never hands out another source's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import CenterCropOrPad
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from ablate.errors import DataError
from ablate.training.data.image_source import image_folder, pair_labels
from ablate.training.evaluations.images import EvalImages
from ablate.training.evaluations.zero_shot import ZeroShot


@contextmanager
def empty_cache() -> Iterator[Path]:
    before = os.environ.get("ABLATE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ABLATE_CACHE"] = f"{folder}/cache"
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["ABLATE_CACHE"]
            else:
                os.environ["ABLATE_CACHE"] = before


def write_images(folder: Path, classes: dict[str, tuple[int, int, int]], *, count: int = 1) -> Path:
    """One-coloured pictures whose names, sizes and times of content are the same everywhere."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = folder / name / f"{number}.bmp"
            Image.new("RGB", (9, 30), colour).save(path)
            os.utime(path, (0, 0))
    return folder


SMALL = Compose([Resize(8), CenterCrop(8)])
TRANSFORMS = {
    "small": SMALL,
    "bilinear": Compose([Resize(8, InterpolationMode.BICUBIC), CenterCrop(8)]),
    "padded with black": CenterCropOrPad(12, fill=0),  # whose text does not name its fill
    "padded with grey": CenterCropOrPad(12, fill=128),
}
colour = st.tuples(*[st.sampled_from([0, 90, 255])] * 3)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("ab"), colour, st.sampled_from([*TRANSFORMS])),
                min_size=2, max_size=4))  # fmt: skip
def test_cached_pixels_are_those_of_their_own_source(
    sources: list[tuple[str, tuple[int, int, int], str]],
) -> None:
    """Whatever other folder, content in the same place, or transform came before: as uncached."""
    with empty_cache() as root:
        for place, shade, name in sources:
            source = image_folder(write_images(root / place, {"x": shade}))
            transform = TRANSFORMS[name]
            size = (12, 12) if "padded" in name else (8, 8)
            cached, plain = (
                EvalImages(source, transform=transform, size=size, cache_gib=gib)
                for gib in (1.0, 0.0)
            )
            (pixels, _), (truth, _) = (next(images.batches(0, 1, 1)) for images in (cached, plain))
            assert torch.equal(pixels, truth)


class Words:
    """Words by their place in a vocabulary; it does not know its own name."""

    fingerprint = "words"

    def __init__(self, vocabulary: list[str]) -> None:
        self._numbers = {word: number + 1 for number, word in enumerate(vocabulary)}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [[self._numbers.get(word, 0) for word in text.split()][:4] for text in texts]
        return torch.tensor([row + [0] * (4 - len(row)) for row in rows])


@settings(max_examples=25)
@given(st.permutations(["a", "photo", "of", "red", "cat"]),
       st.permutations(["a", "photo", "of", "red", "cat"]))  # fmt: skip
def test_cached_prompts_are_those_of_their_own_tokenizer(one: list[str], other: list[str]) -> None:
    """Also of two tokenizers that give the same name to different vocabularies."""
    with empty_cache() as root:
        source = image_folder(write_images(root / "val", {"x": (0, 0, 0)}))
        images = EvalImages(source, transform=SMALL, size=(8, 8), cache_gib=0.0)
        for vocabulary in (one, other):
            words = Words(vocabulary)
            prompts = ["a photo of cat", "red cat"]
            zero_shot = ZeroShot(
                images, [prompts], tokenizer=words, encoder=None, due=lambda epoch: True
            )  # type: ignore[arg-type]
            assert torch.equal(torch.from_numpy(np.array(zero_shot.tokens)), words(prompts))


FOUR = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (255, 255, 0)}


@given(st.sets(st.sampled_from("abcd"), min_size=1), st.sets(st.sampled_from("abcd"), min_size=1))
@settings(max_examples=25)
def test_classes_are_paired_by_name(judged: set[str], learnt: set[str]) -> None:
    """A class's number is that of the folder of its name, whichever other classes are there; one
    that was not learnt is refused by its name."""
    with tempfile.TemporaryDirectory() as folder:
        path, train = (
            image_folder(write_images(Path(folder, place), {name: FOUR[name] for name in names}))
            for place, names in (("val", judged), ("train", learnt))
        )
        if judged <= learnt:
            expected = [sorted(learnt).index(name) for name in sorted(judged)]
            assert pair_labels(path, train).tolist() == expected
        else:
            first = min(judged - learnt)
            with pytest.raises(DataError, match=f"do not occur in .*train.* answer them: {first}"):
                pair_labels(path, train)
