"""A download of images and captions from the web, as img2dataset leaves it: is it whole, and how
much of it is dead?

::

    FOLDER/00000.tar          images and captions of 10,000 links
    FOLDER/00000_stats.json   how many of them were there, and why others were not

Conceptual Captions (CC3M) comes as a list without a header, ``caption<tab>url``.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate.errors import DataError
from ablate.training.data.shards import ShardIndex, index_shards

HEADER = "caption\turl"
CC3M_LINKS = 3_318_333
"""Rows of Train_GCC-training.tsv (Sharma et al. 2018, table 1: 3,318,333 training pairs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """What was found in a folder."""

    pattern: str
    """The shards, for `train_data`."""
    index: ShardIndex
    asked: int
    """Links that were tried."""
    arrived: int
    reasons: Mapping[str, int]
    """Why others did not: img2dataset's words, the most frequent first."""
    unfinished: tuple[str, ...]
    """Shards that were begun and not ended, or are missing between others."""

    @property
    def share_lost(self) -> float:
        return 1 - self.arrived / self.asked if self.asked else 0.0

    @property
    def problems(self) -> tuple[str, ...]:
        """What must be mended before anything is trained on it."""
        found = []
        if self.unfinished:
            shown = ", ".join(self.unfinished[:5])
            found.append(
                f"{len(self.unfinished)} shards are not finished ({shown}, ...): run the same "
                "img2dataset command again, it goes on where it stopped"
            )
        if self.arrived and self.arrived != self.index.num_samples:
            found.append(
                f"img2dataset counts {self.arrived} pairs and the shards hold "
                f"{self.index.num_samples}: something changed them since"
            )
        return tuple(found)


def command(links: Path, folder: Path, *, processes: int = 16, threads: int = 64) -> list[str]:
    """img2dataset's line, with the numbers of its own page on CC3M: 256 pixels, WebDataset."""
    return [
        *("img2dataset", "--url_list", str(links), "--input_format", "tsv"),
        *("--url_col", "url", "--caption_col", "caption"),
        *("--output_format", "webdataset", "--output_folder", str(folder)),
        *("--processes_count", str(processes), "--thread_count", str(threads)),
        *("--image_size", "256"),
    ]


def with_header(links: Path, folder: Path) -> tuple[Path, int]:
    """A copy of the list beside the shards whose columns have names, as img2dataset needs them;
    and its number of links.

    Raises:
        DataError: a row that is no caption and link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "links.tsv"
    count = 0
    with (
        open(links, encoding="utf-8", newline="\n") as source,
        open(copy, "w", encoding="utf-8", newline="\n") as target,
    ):
        target.write(f"{HEADER}\n")
        for number, row in enumerate(source, start=1):
            if number == 1 and row.rstrip("\r\n") == HEADER:
                continue
            if len(row.split("\t")) != 2 or "://" not in row.split("\t")[1]:
                raise DataError(
                    f"{links}:{number}: {row[:60]!r} is no caption and link with a tab between"
                )
            target.write(row)
            count += 1
    return copy, count


def fetch(line: list[str]) -> None:
    """Run img2dataset; what it says goes where this process's output goes.

    Raises:
        DataError: it is not installed, or it failed.
    """
    if shutil.which(line[0]) is None:
        raise DataError(
            f"{line[0]} is not installed here. Install it in an environment of its own (pip "
            f"install img2dataset), and run: {shlex.join(line)}"
        )
    if code := subprocess.run(line, check=False).returncode:
        raise DataError(f"img2dataset ended with status {code}; run it again, it goes on")


def look_at(folder: Path, *, on_shard: Callable[[int, int], None] | None = None) -> Download:
    """Read every shard of a finished download once.

    Raises:
        DataError: the folder holds no shard.
    """
    shards = sorted(path for path in folder.glob("*.tar") if path.stem.isdigit())
    if not shards:
        raise DataError(
            f"{folder} holds no shards (00000.tar, ...). Give the folder of a finished download, "
            "or the list of links: --links Train_GCC-training.tsv"
        )
    width, last = len(shards[-1].stem), int(shards[-1].stem)
    reasons: Counter[str] = Counter()
    asked = arrived = 0
    unfinished = []
    for number in range(last + 1):
        name = f"{number:0{width}d}"
        stats = folder / f"{name}_stats.json"
        if not (folder / f"{name}.tar").is_file() or not stats.is_file():
            unfinished.append(name)
            continue
        said = _read(stats)
        asked += int(said["count"])
        arrived += int(said["successes"])
        reasons.update(
            {why: int(n) for why, n in said.get("status_dict", {}).items() if why != "success"}
        )
    pattern = f"{folder}/{{{0:0{width}d}..{last:0{width}d}}}.tar"
    return Download(
        pattern=pattern,
        index=index_shards(pattern, cache=None, on_shard=on_shard),
        asked=asked,
        arrived=arrived,
        reasons=dict(reasons.most_common()),
        unfinished=tuple(unfinished),
    )


def _read(stats: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(stats.read_text(encoding="utf-8"))
        found["count"], found["successes"]  # noqa: B018  # refuses what is no such file
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{stats} is none of img2dataset's: {error}") from None
    return found
