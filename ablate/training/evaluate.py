"""Evaluations: named measurements of a model, run by all ranks together on their own schedule.

Zero-shot accuracy follows open_clip_train.zero_shot and open_clip.build_zero_shot_classifier step
by step; what differs is the work saved: classes and images are shared out over the ranks (the peer
evaluates on rank 0 while the others wait), prompts are tokenised once, and images are decoded and
resized once for a machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image

from ablate.errors import DataError
from ablate.training import cache
from ablate.training.data import Tokenizer
from ablate.training.distributed import Gang, sum_over_ranks

Encode = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEXTS_PER_BATCH = 512


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


class EvalImages:
    """An image folder after a fixed transform: N x S x S x 3 bytes, mapped from the cache.

    When they would take more than `cache_gib`, they are read anew each time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        transform: Callable[[Any], Any],
        transform_name: str,
        size: tuple[int, int],
        cache_gib: float,
    ) -> None:
        self.paths, self.labels = list_images(folder)
        self._transform = transform
        self._shape = (*size, 3)
        self._pixels: npt.NDArray[np.uint8] | None = None
        if len(self.paths) * int(np.prod(self._shape)) < cache_gib * 2**30:
            facts = [path.stat() for path in self.paths]
            name = cache.key(
                "eval-1",
                transform_name,
                PIL.__version__,
                *(
                    (os.path.relpath(path, folder), fact.st_size, fact.st_mtime_ns)
                    for path, fact in zip(self.paths, facts, strict=True)
                ),
            )
            built = cache.build_once("eval", name, self._build)
            self._pixels = np.load(built / "pixels.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.paths)

    def batches(
        self, start: int, stop: int, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels) of `start` to `stop`."""
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            if self._pixels is not None:
                pixels = np.array(self._pixels[first:last])
            else:
                pixels = np.stack(list(self._read(self.paths[first:last])))
            yield torch.from_numpy(pixels), torch.from_numpy(self.labels[first:last])

    def _build(self, folder: Path) -> None:
        pixels = np.lib.format.open_memmap(
            folder / "pixels.npy", "w+", np.uint8, (len(self.paths), *self._shape)
        )
        for row, image in enumerate(self._read(self.paths)):
            pixels[row] = image
        pixels.flush()

    def _read(self, paths: Sequence[Path]) -> Iterator[npt.NDArray[np.uint8]]:
        """Transformed images; decoding and resizing leave Python's lock, so threads help."""

        def read(path: Path) -> npt.NDArray[np.uint8]:
            try:
                with Image.open(path) as image:
                    return np.asarray(self._transform(image.convert("RGB")))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise DataError(f"{path} cannot be read as an image: {error}") from error

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield from pool.map(read, paths)


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
    """Zero-shot top-1 and top-5 accuracy on an image folder.

    `prompts` holds the same number of texts for each class, in the order of the class folders.
    """

    name = "zero_shot"

    def __init__(
        self,
        images: EvalImages,
        prompts: Sequence[Sequence[str]],
        *,
        tokenizer: Tokenizer,
        tokenizer_name: str,
        encode_image: Encode,
        encode_text: Encode,
        autocast: Callable[[], AbstractContextManager[Any]],
        to_input: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
        batch_size: int,
        due: Callable[[int], bool],
    ) -> None:
        self._images = images
        self._prompts = prompts
        self._encode_image = encode_image
        self._encode_text = encode_text
        self._autocast = autocast
        self._to_input = to_input
        self._device = device
        self._batch_size = batch_size
        self._due = due
        self._tokens = _tokenise_once(prompts, tokenizer, tokenizer_name)

    def due(self, epoch: int) -> bool:
        return self._due(epoch)

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """imagenet_top1, imagenet_top5, eval_images, eval_time_s; equal on all ranks."""
        began = time.perf_counter()
        with torch.inference_mode():
            classifier = self.classifier(model, gang)
            counts = torch.zeros(3, dtype=torch.float64)
            share = len(self._images) * gang.rank // gang.world_size
            end = len(self._images) * (gang.rank + 1) // gang.world_size
            for images, labels in self._images.batches(share, end, self._batch_size):
                found = self._correct(model, classifier, images, labels)
                counts += torch.tensor([*found, len(labels)], dtype=torch.float64)
            sum_over_ranks(counts, gang)
        top1, top5, total = counts.tolist()
        return {
            "imagenet_top1": top1 / total,
            "imagenet_top5": top5 / total,
            "eval_images": total,
            "eval_time_s": time.perf_counter() - began,
        }

    def classifier(self, model: torch.nn.Module, gang: Gang) -> torch.Tensor:
        """Class embeddings, features x classes; each rank makes its share of them."""
        num_classes, num_prompts = len(self._prompts), len(self._prompts[0])
        shared = 1 < gang.world_size <= num_classes
        rank, ranks = (gang.rank, gang.world_size) if shared else (0, 1)
        first, last = num_classes * rank // ranks, num_classes * (rank + 1) // ranks
        parts = []
        step = max(1, TEXTS_PER_BATCH // num_prompts)
        for begin in range(first, last, step):
            count = min(step, last - begin)
            rows = self._tokens[begin * num_prompts : (begin + count) * num_prompts]
            texts_of_batch = torch.from_numpy(rows.astype(np.int64)).to(self._device)
            with self._autocast():
                features = self._encode_text(model, texts_of_batch)
                embeddings = features.reshape(count, num_prompts, -1).mean(dim=1)
                embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
            parts.append(embeddings)
        mine = torch.cat(parts)
        if not shared:
            return mine.T
        whole = torch.zeros(num_classes, mine.shape[1], device=self._device)
        whole[first:last] = mine.float()  # exact: 16-bit floats are 32-bit floats
        return sum_over_ranks(whole, gang).to(mine.dtype).T

    def _correct(
        self,
        model: torch.nn.Module,
        classifier: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[float, float]:
        """How many images have their class first, and among the first five."""
        with self._autocast():
            features = self._encode_image(model, self._to_input(images.to(self._device)))
            logits = 100.0 * features @ classifier
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        correct = best == labels.to(self._device)[:, None]
        return float(correct[:, 0].sum()), float(correct.sum())
