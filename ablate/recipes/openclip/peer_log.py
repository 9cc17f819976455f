"""The log of open_clip_train, 2.x and 3.x: its out.log, with results.jsonl beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablate.markers.event import Context, number
from ablate.markers.foreign.finish import finish
from ablate.markers.foreign.run import Evaluated, Foreign, ForeignError, Trainer
from ablate.recipes.openclip.plan import IMAGENET

TOP1, TOP5 = (metric.name for metric in IMAGENET)
FRACTIONS = {"imagenet-zeroshot-val-top1": TOP1, "imagenet-zeroshot-val-top5": TOP5}
CONTEXT = Context(accuracy=TOP1, chance_top1=1e-3, eval_images=50_000)

_PLACE = re.compile(r"Train Epoch: (?P<epoch>\d+) \[\s*(?P<samples>\d+)/(?P<of>\d+) ")
_VALUES = {
    "lr": re.compile(r"\bLR: (\S+)"),
    "logit_scale": re.compile(r"\bLogit Scale: (\S+)"),
    "loss": re.compile(r"\bLoss: (\S+) \("),
}
"""In 2.x the loss comes first, in 3.x last."""
_EVAL = re.compile(r"Eval Epoch: (?P<epoch>\d+) (?P<pairs>\S+: .*)$")
_PARAM = re.compile(r"\| INFO \|   (?P<name>\w+): (?P<value>.*)$")


_RECORDING = frozenset(
    """
    name logs log_path log_level log_local log_every_n_steps checkpoint_path tensorboard
    tensorboard_path wandb wandb_notes wandb_project_name report_to save_logs save_frequency
    save_most_recent delete_previous_checkpoint zeroshot_frequency val_frequency resume debug
    copy_codebase cache_dir remote_sync remote_sync_frequency remote_sync_protocol rank local_rank
    dist_url dist_backend no_set_device_rank horovod
    """.split()
)


@dataclass(slots=True)
class _Segment:
    """What one start of the trainer printed: its parameters, then its lines of training."""

    params: dict[str, str] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def batch(self) -> int:
        """Samples per optimizer step; without parameters what the first line has counted."""
        names = ("batch_size", "world_size", "accum_freq")
        sizes = [number(self.params.get(name)) or 0.0 for name in names]
        if all(sizes):
            return int(math.prod(sizes))
        return max(1, min(int(line["in_epoch"]) for line in self.lines))

    @property
    def per_epoch(self) -> int:
        return max(1, int(self.lines[0]["of"]) // self.batch)


def peer_runs() -> Trainer:
    """How runs of open_clip_train are known, and read."""
    return Trainer(
        kind="the out.log (or folder) of an open_clip_train run",
        logs=("out*.log", "out-*"),
        fractions=FRACTIONS,
        context=CONTEXT,
        read=lambda log, text: _read(log, text) if _is_its_log(text) else None,
        wrote=lambda files: any((file.parent.parent / "params.txt").exists() for file in files),
        recording=_RECORDING,
    )


def _is_its_log(text: str) -> bool:
    return any(_VALUES["loss"].search(line) for line in text.splitlines() if _PLACE.search(line))


def _read(log: Path, text: str) -> Foreign:
    """Its log has the loss of rank 0 on every hundredth step only.

    A run that was resumed appends to its log, maybe with another batch: each start is read by
    its own parameters.

    Raises:
        ForeignError: no line of training.
    """
    segments, evaluated = _parse(text)
    segments = [segment for segment in segments if segment.lines]
    if not segments:
        raise ForeignError(f"{log} has no line of training")
    rows, sizes = [], dict[int, int]()
    attempt, before = 0, 0
    for segment in segments:
        attempt += 1
        per_epoch, batch = segment.per_epoch, segment.batch
        first = True
        for line in segment.lines:
            sizes[line["epoch"]] = per_epoch
            done = sum(sizes.get(epoch, per_epoch) for epoch in range(line["epoch"]))
            step = done + line["in_epoch"] // batch
            attempt += step <= before and not first  # it was resumed: it replays from here
            before, first = step, False
            rows.append({"step": step, "attempt": attempt, **line["values"]})
    last = segments[-1]
    notes = [
        f"global batch {last.batch} and {last.per_epoch} steps an epoch, as the log counts samples",
        "the loss is that of rank 0; other steps and ranks are not in the log",
    ]
    batches = list(dict.fromkeys(segment.batch for segment in segments))
    if len(batches) > 1:
        notes.append("the global batch changed: " + ", then ".join(map(str, batches)))
    if attempt > 1:
        notes.append(f"the run was resumed {attempt - 1} times; replayed steps count once")
    evals = _evaluations(log, evaluated, sizes, last.per_epoch, notes)
    epochs, warmup = number(last.params.get("epochs")), number(last.params.get("warmup"))
    total = None
    if epochs:
        total = sum(sizes.get(epoch, last.per_epoch) for epoch in range(int(epochs)))
    context = replace(
        CONTEXT,
        global_batch=last.batch,
        warmup=int(warmup) if warmup is not None else 0,
        steps_total=total,
    )
    return finish(rows, notes, context, Evaluated((peer_runs(),)), evals)


def _parse(text: str) -> tuple[list[_Segment], list[dict[str, Any]]]:
    segments, evaluated = [_Segment()], []
    for line in text.splitlines():
        if match := _PLACE.search(line):
            found = {name: shape.search(line) for name, shape in _VALUES.items()}
            values = {n: v for n, m in found.items() if m and (v := number(m[1])) is not None}
            if "loss" in values:
                segments[-1].lines.append(
                    {
                        "epoch": int(match["epoch"]),
                        "in_epoch": int(match["samples"]),
                        "of": int(match["of"]),
                        "values": values,
                    }
                )
        elif match := _EVAL.search(line):
            evaluated.append({"epoch": int(match["epoch"]), **_pairs(match["pairs"])})
        elif match := _PARAM.search(line):
            if segments[-1].lines:
                segments.append(_Segment())
            segments[-1].params[match["name"]] = match["value"]
    return segments, evaluated


def _evaluations(
    log: Path,
    evaluated: list[dict[str, Any]],
    sizes: Mapping[int, int],
    per_epoch: int,
    notes: list[str],
) -> list[dict[str, Any]]:
    """Accuracies of results.jsonl where it stands beside the log, else of the log (4 digits)."""
    found = [log.parent / "checkpoints" / "results.jsonl", log.parent / "results.jsonl"]
    results = next((file for file in found if file.exists()), None)
    told = evaluated
    if results is not None:
        exact = list(_results(results, notes))
        if len(exact) == len(evaluated):
            told = [before | line for before, line in zip(evaluated, exact, strict=True)]
        elif not evaluated:
            told = [{"epoch": place, **line} for place, line in enumerate(exact, start=1)]
            notes.append("results.jsonl names no epochs: its lines are taken as epochs 1, 2, ...")
        else:
            notes.append("results.jsonl does not match the log and is not used")
    rows = []
    for item in told:
        done = sum(sizes.get(epoch, per_epoch) for epoch in range(int(item["epoch"])))
        row: dict[str, Any] = {"step": done}
        for name, value in item.items():
            ours = FRACTIONS.get(name.lower())
            if ours and number(value) is not None:
                row[ours] = number(value)
        if len(row) > 1:
            rows.append(row)
    return rows


def _results(file: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The whole lines; a run that was killed while it wrote leaves one that is none."""
    cut = 0
    for line in file.read_bytes().split(b"\n"):
        try:
            item = json.loads(line) if line.strip(b"\0 \r") else None
        except ValueError:
            cut += 1
            continue
        if isinstance(item, dict):
            yield item
    if cut:
        notes.append(f"{cut} lines of {file.name} are cut or damaged and were not read")


def _pairs(text: str) -> dict[str, Any]:
    """``name: value`` pairs separated by tabs."""
    parts = (part.rpartition(": ") for part in text.split("\t"))
    return {name.strip(): number(value) for name, colon, value in parts if colon}
