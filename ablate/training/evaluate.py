"""Evaluations: named measurements of a model, run by all ranks together on their own schedule.

Each is a small object with a name, ``due(epoch)`` and ``run(model, gang)`` (the Evaluation of
ablate.recipes). It shares its images out over the ranks, gives every rank the same numbers, and
leaves the model, its buffers and all generators as they were, so that measuring more or less
often changes no training.

Zero-shot accuracy follows open_clip_train.zero_shot and open_clip.build_zero_shot_classifier step
by step; what differs is the work saved: classes and images are shared out over the ranks (the peer
evaluates on rank 0 while the others wait), prompts are tokenised once, and images are decoded and
resized once for a machine.
"""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image

from ablate.datasets.shard_names import expand_shards
from ablate.datasets.shard_scan import IMAGE_TYPES
from ablate.datasets.shards import ShardIndex
from ablate.errors import DataError
from ablate.training import cache, scores
from ablate.training.data import Tokenizer
from ablate.training.distributed import Gang, broadcast, gather_rows, sum_over_ranks
from ablate.training.pulse import part_ended

Encode = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEXTS_PER_BATCH = 512


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Encoded images and what each shows."""

    labels: npt.NDArray[np.int64]
    """Class number of each image; empty where images have captions instead."""
    texts: tuple[str, ...]
    """Caption of each image; empty where images have labels instead."""
    read: Callable[[int], bytes]
    """The file of image i."""
    describe: Callable[[int], str]
    """Where image i lies, for messages."""
    facts: tuple[object, ...]
    """They change when the images do."""

    def __len__(self) -> int:
        return max(len(self.labels), len(self.texts))


def image_folder(folder: Path) -> ImageSource:
    """A folder of class folders, in torchvision.ImageFolder's order.

    Raises:
        DataError: a class without images.
    """
    paths, labels = list_images(folder)
    facts = [path.stat() for path in paths]
    return ImageSource(
        labels=labels,
        texts=(),
        read=lambda number: paths[number].read_bytes(),
        describe=lambda number: str(paths[number]),
        facts=tuple(
            (os.path.relpath(path, folder), fact.st_size, fact.st_mtime_ns)
            for path, fact in zip(paths, facts, strict=True)
        ),
    )


def list_images(folder: Path) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """Images of an image folder and their class numbers, in torchvision.ImageFolder's order.

    Raises:
        DataError: a class without images.
    """
    paths: list[Path] = []
    labels: list[int] = []
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    for label, name in enumerate(classes):
        before = len(paths)
        for root, _, files in sorted(os.walk(folder / name, followlinks=True)):
            found = [Path(root, file) for file in sorted(files)]
            paths += [path for path in found if path.suffix.lower() in IMAGE_ENDINGS]
        if len(paths) == before:
            raise DataError(f"{folder / name} holds no images; a class needs at least one")
        labels += [label] * (len(paths) - before)
    return paths, np.array(labels, np.int64)


def labelled_shards(pattern: str) -> ImageSource:
    """WebDataset shards whose samples are an image and a class number (``.cls``), in their order.

    Raises:
        DataError: a shard cannot be read, or a sample has no whole number as its class.
    """
    paths = [Path(path) for path in expand_shards(pattern)]
    places: list[tuple[Path, int, int, str]] = []
    labels: list[int] = []
    for path in paths:
        try:
            with tarfile.open(path) as tar:
                for key, parts in _samples(tar).items():
                    image = next((parts[kind] for kind in IMAGE_TYPES if kind in parts), None)
                    label = parts.get("cls")
                    if image is None or label is None:
                        raise DataError(
                            f"{path}: sample {key} has {', '.join(parts)}; a labelled sample is "
                            "an image and a .cls file with its class number"
                        )
                    file = tar.extractfile(label)
                    assert file is not None
                    labels.append(_class_number(file.read(), f"{path}: {label.name}"))
                    places.append((path, image.offset_data, image.size, image.name))
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"shard {path} cannot be read: {error}") from error
    if not places:
        raise DataError(f"{pattern} holds no labelled images")

    def read(number: int) -> bytes:
        path, offset, size, _ = places[number]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    stats = [path.stat() for path in paths]
    return ImageSource(
        labels=np.array(labels, np.int64),
        texts=(),
        read=read,
        describe=lambda number: f"{places[number][0]}: {places[number][3]}",
        facts=tuple(
            (str(path), fact.st_size, fact.st_mtime_ns)
            for path, fact in zip(paths, stats, strict=True)
        ),
    )


def _samples(tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Members by key (the path up to the first dot of its last part) and ending, in order."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if member.isfile() and dot and stem and not member.name.startswith("__"):
            samples.setdefault(folder + slash + stem, {})[ending.lower()] = member
    return samples


def _class_number(content: bytes, where: str) -> int:
    try:
        number = int(content)
    except ValueError:
        number = -1
    if number < 0:
        raise DataError(f"{where} holds {content[:40]!r}, which is no class number (0, 1, ...)")
    return number


def captioned_shards(index: ShardIndex) -> ImageSource:
    """All images and captions of WebDataset shards."""
    texts = tuple(index.read(number)[1] for number in range(index.num_samples))
    return ImageSource(
        labels=np.zeros(0, np.int64),
        texts=texts,
        read=lambda number: index.read(number)[0],
        describe=index.describe,
        facts=(index.fingerprint,),
    )


class EvalImages:
    """Images after a fixed transform: N x S x S x 3 bytes, mapped from the cache.

    When they would take more than `cache_gib`, they are read anew each time.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        transform: Callable[[Any], Any],
        transform_name: str,
        size: tuple[int, int],
        cache_gib: float,
    ) -> None:
        self.source = source
        self._transform = transform
        self._shape = (*size, 3)
        self._pixels: npt.NDArray[np.uint8] | None = None
        if len(source) * int(np.prod(self._shape)) < cache_gib * 2**30:
            name = cache.key("eval-1", transform_name, PIL.__version__, *source.facts)
            built = cache.build_once("eval", name, self._build)
            self._pixels = np.load(built / "pixels.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self.source.labels

    def batches(
        self, start: int, stop: int, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels) of `start` to `stop`."""
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            if self._pixels is not None:
                pixels = np.array(self._pixels[first:last])
            else:
                pixels = np.stack(list(self._read(range(first, last))))
            yield torch.from_numpy(pixels), torch.from_numpy(self.labels[first:last])

    def chosen(self, rows: npt.NDArray[np.int64], batch_size: int) -> Iterator[torch.Tensor]:
        """Images of these rows."""
        for first in range(0, len(rows), batch_size):
            mine = rows[first : first + batch_size]
            if self._pixels is not None:
                yield torch.from_numpy(np.array(self._pixels[mine]))
            else:
                yield torch.from_numpy(np.stack(list(self._read(mine.tolist()))))

    def _build(self, folder: Path) -> None:
        pixels = np.lib.format.open_memmap(
            folder / "pixels.npy", "w+", np.uint8, (len(self), *self._shape)
        )
        for row, image in enumerate(self._read(range(len(self)))):
            pixels[row] = image
        pixels.flush()

    def _read(self, rows: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """Transformed images; decoding and resizing leave Python's lock, so threads help."""

        def read(row: int) -> npt.NDArray[np.uint8]:
            try:
                with Image.open(io.BytesIO(self.source.read(row))) as image:
                    return np.asarray(self._transform(image.convert("RGB")))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                where = self.source.describe(row)
                raise DataError(f"{where} cannot be read as an image: {error}") from error

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield from pool.map(read, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """How images and texts become features of norm 1, on this rank's device."""

    encode_image: Encode
    encode_text: Encode
    autocast: Callable[[], AbstractContextManager[Any]]
    to_input: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    batch_size: int

    def images(self, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Features of a batch of 8-bit images; call within `autocast`."""
        part_ended()
        return self.encode_image(model, self.to_input(pixels.to(self.device)))

    def texts(self, model: torch.nn.Module, tokens: npt.NDArray[np.int32]) -> torch.Tensor:
        """Features of a batch of token numbers; call within `autocast`."""
        part_ended()
        return self.encode_text(model, torch.from_numpy(tokens.astype(np.int64)).to(self.device))


def share(total: int, gang: Gang) -> tuple[int, int]:
    """First and last (exclusive) of this rank's part of `total` things."""
    return total * gang.rank // gang.world_size, total * (gang.rank + 1) // gang.world_size


def image_features(
    model: torch.nn.Module, images: EvalImages, encoder: Encoder, gang: Gang
) -> torch.Tensor:
    """Features of all images on every rank, each of which computes its part; float32."""
    first, last = share(len(images), gang)
    parts = []
    with torch.inference_mode(), encoder.autocast():
        for pixels, _ in images.batches(first, last, encoder.batch_size):
            parts.append(encoder.images(model, pixels).float())
    if not parts:
        raise DataError(
            f"{len(images)} images are fewer than the {gang.world_size} ranks that share them; "
            "give the evaluation a larger set"
        )
    return gather_rows(torch.cat(parts), first, len(images), gang)


def _tokenise_once(
    prompts: Sequence[Sequence[str]], tokenizer: Tokenizer, tokenizer_name: str
) -> npt.NDArray[np.int32]:
    """Token numbers of all prompts, one row each, mapped from the cache."""
    texts = [text for of_class in prompts for text in of_class]

    def build(folder: Path) -> None:
        np.save(folder / "tokens.npy", tokenizer(texts).numpy().astype(np.int32))

    folder = cache.build_once("prompts", cache.key("prompts-1", tokenizer_name, *texts), build)
    tokens: npt.NDArray[np.int32] = np.load(folder / "tokens.npy", mmap_mode="r")
    return tokens


class ZeroShot:
    """Zero-shot top-1 and top-5 accuracy on labelled images.

    `prompts` holds the same number of texts for each class, in the order of the class numbers.
    `measures` are the names of both accuracies, `counts` that of the number of images (None: it
    is not told) and `clock` that of the wall time.
    """

    def __init__(
        self,
        images: EvalImages,
        prompts: Sequence[Sequence[str]],
        *,
        tokenizer: Tokenizer,
        tokenizer_name: str,
        encoder: Encoder,
        due: Callable[[int], bool],
        name: str = "zero_shot",
        measures: Sequence[str] = ("imagenet_top1", "imagenet_top5"),
        counts: str | None = "eval_images",
        clock: str = "eval_time_s",
    ) -> None:
        self.name = name
        self._images = images
        self._prompts = prompts
        self._encoder = encoder
        self.due = due
        self._measures = measures
        self._counts = counts
        self._clock = clock
        self._tokens = _tokenise_once(prompts, tokenizer, tokenizer_name)

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """Both accuracies, number of images, seconds; equal on all ranks."""
        began = time.perf_counter()
        with torch.inference_mode():
            classifier = self.classifier(model, gang)
            counts = torch.zeros(3, dtype=torch.float64)
            first, last = share(len(self._images), gang)
            for images, labels in self._images.batches(first, last, self._encoder.batch_size):
                found = self._correct(model, classifier, images, labels)
                counts += torch.tensor([*found, len(labels)], dtype=torch.float64)
            sum_over_ranks(counts, gang)
        top1, top5, total = counts.tolist()
        measured = dict(zip(self._measures, (top1 / total, top5 / total), strict=True))
        if self._counts is not None:
            measured[self._counts] = total
        return {**measured, self._clock: time.perf_counter() - began}

    def classifier(self, model: torch.nn.Module, gang: Gang) -> torch.Tensor:
        """Class embeddings, features x classes; each rank makes its share of them."""
        num_classes, num_prompts = len(self._prompts), len(self._prompts[0])
        shared = 1 < gang.world_size <= num_classes
        first, last = share(num_classes, gang) if shared else (0, num_classes)
        tokens = self._tokens[first * num_prompts : last * num_prompts]
        # Texts of like length go together: an encoder may leave out the padding behind the longest.
        order = np.argsort((tokens != 0).sum(axis=1), kind="stable")
        with self._encoder.autocast():
            parts = [
                self._encoder.texts(model, tokens[order[begin : begin + TEXTS_PER_BATCH]])
                for begin in range(0, len(order), TEXTS_PER_BATCH)
            ]
            features = torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(parts[0].device)]
            embeddings = features.reshape(last - first, num_prompts, -1).mean(dim=1)
            mine: torch.Tensor = embeddings / embeddings.norm(dim=1, keepdim=True)
        if not shared:
            return mine.T
        # Exact: 16-bit floats are 32-bit floats.
        return gather_rows(mine.float(), first, num_classes, gang).to(mine.dtype).T

    def _correct(
        self,
        model: torch.nn.Module,
        classifier: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[float, float]:
        """How many images have their class first, and among the first five."""
        with self._encoder.autocast():
            logits = 100.0 * self._encoder.images(model, images) @ classifier
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        correct = best == labels.to(best.device)[:, None]
        return float(correct[:, 0].sum()), float(correct.sum())


Labelled = tuple[torch.Tensor, torch.Tensor]
"""Features of images and the numbers of their classes, on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Top-1 accuracy of the nearest neighbours in feature space (:func:`scores.knn_correct`)."""

    images: EvalImages
    reference: EvalImages | None = None
    """Labelled images to learn from; None: others of `images`."""
    label: str = ""
    """What the measurement's name ends in."""
    neighbours: int = scores.NEIGHBOURS
    temperature: float = scores.TEMPERATURE

    @property
    def name(self) -> str:
        return f"knn{self.label}"

    def top1(self, judged: Labelled, reference: Labelled | None, gang: Gang) -> float:
        """Each rank asks for its share of the images."""
        features, labels = judged
        correct = scores.knn_correct(
            features,
            labels,
            reference=reference,
            rows=slice(*share(len(features), gang)),
            neighbours=self.neighbours,
            temperature=self.temperature,
        )
        right = sum_over_ranks(correct.sum(dtype=torch.float64).cpu(), gang)
        return float(right) / len(features)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbe:
    """Top-1 accuracy of a linear classifier on frozen features (:func:`scores.linear_correct`)."""

    images: EvalImages
    reference: EvalImages | None = None
    label: str = ""
    penalty: float = scores.PENALTY

    @property
    def name(self) -> str:
        return f"linear{self.label}"

    def top1(self, judged: Labelled, reference: Labelled | None, gang: Gang) -> float:
        """The fit is made on rank 0."""
        share_right = None
        if gang.first:
            correct = scores.linear_correct(*judged, reference=reference, penalty=self.penalty)
            share_right = float(correct.double().mean())
        top1: float = broadcast(share_right, gang)
        return top1


@dataclass(frozen=True, slots=True, kw_only=True)
class OnFeatures:
    """What is read from the features of labelled images, which are computed once for all of it.

    The features of a set that several `readers` share count in the time of the first of them.
    """

    readers: tuple[Neighbours | LinearProbe, ...]
    encoder: Encoder
    due: Callable[[int], bool]

    @property
    def name(self) -> str:
        return "+".join(reader.name for reader in self.readers)

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """Accuracy and seconds of each reader."""
        known: dict[int, Labelled] = {}

        def measure(images: EvalImages) -> Labelled:
            if id(images) not in known:
                features = image_features(model, images, self.encoder, gang)
                known[id(images)] = features, torch.from_numpy(images.labels).to(features.device)
            return known[id(images)]

        measured = {}
        for reader in self.readers:
            began = time.perf_counter()
            reference = None if reader.reference is None else measure(reader.reference)
            top1 = reader.top1(measure(reader.images), reference, gang)
            kind = reader.name.removesuffix(reader.label)
            measured[f"{kind}_top1{reader.label}"] = top1
            measured[f"eval_time_s/{reader.name}"] = time.perf_counter() - began
        return measured


class Retrieval:
    """Image-to-text and text-to-image recall at 1, 5 and 10 on pairs (:func:`scores.recalls`)."""

    def __init__(
        self,
        images: EvalImages,
        *,
        tokenizer: Tokenizer,
        tokenizer_name: str,
        encoder: Encoder,
        due: Callable[[int], bool],
        label: str = "",
    ) -> None:
        self.name = f"retrieval{label}"
        self._images = images
        self._encoder = encoder
        self.due = due
        self._label = label
        captions = [[text] for text in images.source.texts]
        self._tokens = _tokenise_once(captions, tokenizer, tokenizer_name)

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """The six recalls and the seconds; each rank ranks its share of the pairs."""
        began = time.perf_counter()
        images = image_features(model, self._images, self._encoder, gang)
        texts = self._text_features(model, gang)
        rows = slice(*share(len(images), gang))
        measured = {}
        for way, queries, targets in (("i2t", images, texts), ("t2i", texts, images)):
            found = scores.recalls(queries, targets, rows=rows).sum(dim=0).cpu()
            for k, right in zip(scores.RECALLS, sum_over_ranks(found, gang), strict=True):
                measured[f"retrieval_{way}_r{k}{self._label}"] = float(right) / len(images)
        measured[f"eval_time_s/{self.name}"] = time.perf_counter() - began
        return measured

    def _text_features(self, model: torch.nn.Module, gang: Gang) -> torch.Tensor:
        first, last = share(len(self._tokens), gang)
        parts = []
        with torch.inference_mode(), self._encoder.autocast():
            for begin in range(first, last, TEXTS_PER_BATCH):
                rows = self._tokens[begin : min(begin + TEXTS_PER_BATCH, last)]
                parts.append(self._encoder.texts(model, rows).float())
        return gather_rows(torch.cat(parts), first, len(self._tokens), gang)
