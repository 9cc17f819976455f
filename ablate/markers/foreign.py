"""Reading runs that were made elsewhere, so that the markers can judge them.

``read_foreign(path)`` takes what people have:

- a CSV with a header: ``step``, ``loss``, ``grad_norm``, ``logit_scale``, ``lr``,
  ``imagenet_top1``, and any other measurement that the markers read; other columns are ignored;
- TensorBoard event files, or a folder with them (needs the tensorboard package);
- the log of open_clip_train 3.x: its ``out.log`` or the folder of the run, with
  ``checkpoints/results.jsonl`` for the accuracies.

What was assumed, converted or missing is said in ``Foreign.notes``.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ablate.errors import AblateError
from ablate.markers.event import Context, number
from ablate.markers.judge import judge
from ablate.markers.rules import RULES
from ablate.markers.thresholds import Thresholds
from ablate.source import read_csv, read_text

EXPECTED = ("loss", "grad_norm", "logit_scale", "lr", "imagenet_top1")
"""What a foreign run should bring beside ``step``; what it lacks is said."""

_EVALUATED = ("imagenet_top1", "imagenet_top5", "eval_images")
_ALIASES = {
    "learning_rate": "lr",
    "gradient_norm": "grad_norm",
    "gnorm": "grad_norm",
    "scale": "logit_scale",
    "imagenet-zeroshot-val-top1": "imagenet_top1",
    "imagenet-zeroshot-val-top5": "imagenet_top5",
}
_MEASURED = {name for rule in RULES for name in rule.reads} | {*EXPECTED, *_EVALUATED, "samples"}
_LOG_LIMIT = math.log(100.0) + 0.1  # open_clip clamps the parameter to ln 100 = 4.605
_IMAGENET = Context(chance_top1=1e-3, eval_images=50_000)


class ForeignError(AblateError, ValueError):
    """A file that holds no run that could be read; says what would be."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A run made elsewhere, in our rows."""

    rows: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    context: Context
    """What the source says about the run itself; None where it does not."""
    notes: Sequence[str]
    """What was assumed, converted, ignored or missing, one sentence each."""


def judge_foreign(
    path: str | Path,
    *,
    global_batch: int | None = None,
    warmup: int | None = None,
    thresholds: Thresholds | None = None,
) -> dict[str, Any]:
    """The verdict on a run made elsewhere, JSON-able, with ``notes`` on how it was read.

    ``global_batch`` (samples per softmax, all workers together) and ``warmup`` (steps)
    overrule what the source says of them.
    """
    run = read_foreign(path)
    context, notes = run.context, list(run.notes)
    if global_batch is not None:
        context = replace(context, global_batch=global_batch)
    if warmup is not None:
        context = replace(context, warmup=warmup)
    if context.global_batch is None:
        notes.append("the global batch size is not known: a loss at chance level cannot be seen")
    if warmup is None and context.warmup == 0:
        notes.append("the length of the warm-up is not known and taken as 0")
    judgement = judge(run.rows, run.evaluations, thresholds=thresholds, context=context)
    return judgement.to_dict() | {"notes": notes}


def read_foreign(path: str | Path) -> Foreign:
    """Read a run made elsewhere; raises ForeignError when there is none."""
    place = Path(path)
    if not place.exists():
        raise ForeignError(f"{place} does not exist; give {_KINDS}")
    if place.is_dir():
        logs = [*sorted(place.glob("out*.log")), *sorted(place.glob("out-*"))]
        if logs:
            return _read_openclip(logs[0], _read_log(logs[0]))
        events = sorted(place.rglob("*tfevents*"))
        if events:
            return _read_tensorboard(events)
        raise ForeignError(f"{place} has neither an out.log nor event files; give {_KINDS}")
    if "tfevents" in place.name:
        return _read_tensorboard([place])
    text = _read_log(place)
    if "Train Epoch:" in text:
        return _read_openclip(place, text)
    return _read_csv(place, text)


_KINDS = (
    "a CSV with the columns step, loss, grad_norm, logit_scale, lr, imagenet_top1, TensorBoard "
    "event files, or the out.log (or folder) of an open_clip_train run"
)


def _read_log(place: Path) -> str:
    return read_text(place, error=ForeignError, errors="replace")


def _read_csv(place: Path, text: str) -> Foreign:
    header = text.split("\n", 1)[0]
    delimiter = max((",", ";", "\t"), key=header.count)
    reader = read_csv(text, place, delimiter=delimiter, error=ForeignError)
    names = [_our_name(cell) for cell in next(reader, (1, []))[1]]
    used = [name for name in names if name == "step" or _is_measured(name)]
    if not set(used) - {"step"}:
        given = repr(header[:80]) if header.isprintable() and "\ufffd" not in header else "no text"
        near = [n for name in names for n in difflib.get_close_matches(name, EXPECTED, n=1)]
        raise ForeignError(
            f"{place}: its first line names none of {', '.join(EXPECTED)} (it is "
            f"{given if header else 'empty'}); "
            + (f"did you mean {near[0]!r}? Otherwise give {_KINDS}" if near else f"give {_KINDS}")
        )
    notes = []
    ignored = [name for name in names if name and name not in used and name != "attempt"]
    if ignored:
        notes.append("ignored columns: " + ", ".join(ignored))
    if "step" not in used:
        notes.append("there is no column step: lines are numbered from 1 as steps")
    rows: list[dict[str, Any]] = []
    for line, cells in reader:
        row: dict[str, Any] = {"step": len(rows) + 1}
        for name, cell in zip(names, cells, strict=False):
            if name in used and cell.strip():
                row[name] = _cell(place, line, name, cell)
        rows.append(row)
    if not rows:
        raise ForeignError(f"{place} has a header but no rows; give a line for each step")
    return _finish(rows, notes, Context())


def _cell(place: Path, line: int, name: str, cell: str) -> float | int:
    value = number(cell.strip())
    if value is None or (name == "step" and not math.isfinite(value)):
        raise ForeignError(
            f"{place}:{line}: {name} is {cell.strip()!r}, not a number; leave the cell empty where "
            "nothing was measured (nan and inf are numbers)"
            if name != "step"
            else f"{place}:{line}: step is {cell.strip()!r}, not a number; number the steps from 1"
        )
    return int(value) if name == "step" else value


def _read_tensorboard(files: Sequence[Path]) -> Foreign:
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise ForeignError(
            f"reading {files[0]} needs the tensorboard package: pip install tensorboard; or "
            "export the scalars as CSV"
        ) from error
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    ignored: set[str] = set()
    for file in files:
        for record in EventFileLoader(str(file)).Load():
            for value in record.summary.value if record.HasField("summary") else ():
                name = _our_name(value.tag.removeprefix("train/").removeprefix("val/"))
                if not _is_measured(name):
                    ignored.add(value.tag)
                    continue
                kept = value.HasField("tensor")
                scalar = float(make_ndarray(value.tensor)) if kept else value.simple_value
                table = evaluations if name in _EVALUATED else steps
                table.setdefault(record.step, {"step": record.step})[name] = scalar
    if not steps and not evaluations:
        raise ForeignError(
            f"{files[0].parent} has no scalar named loss, grad_norm, logit_scale (or scale), lr "
            f"or imagenet_top1; it has {', '.join(sorted(ignored)) or 'none at all'}"
        )
    notes = ["ignored scalars: " + ", ".join(sorted(ignored))] if ignored else []
    rows = [steps[step] for step in sorted(steps)]
    evals = [evaluations[step] for step in sorted(evaluations)]
    if rows and evals and evals[-1]["step"] > 0 and evals[-1]["step"] * 5 < rows[-1]["step"]:
        # open_clip_train numbers evaluations by epoch; the last one stands at the run's end
        per_epoch = max(1, round(rows[-1]["step"] / evals[-1]["step"]))
        evals = [{**item, "step": item["step"] * per_epoch} for item in evals]
        notes.append(f"evaluations are numbered by epoch: one taken as {per_epoch} steps")
    return _finish(rows, notes, _IMAGENET if _looks_openclip(files) else Context(), evals)


def _looks_openclip(files: Sequence[Path]) -> bool:
    return any((file.parent.parent / "params.txt").exists() for file in files)


_TRAIN = re.compile(
    r"Train Epoch: (?P<epoch>\d+) \[\s*(?P<samples>\d+)/(?P<of>\d+) .*?"
    r"LR: (?P<lr>\S+) Logit Scale: (?P<scale>\S+) .*?\bLoss: (?P<loss>\S+) \("
)
_EVAL = re.compile(r"Eval Epoch: (?P<epoch>\d+) (?P<pairs>\S+: .*)$")
_PARAM = re.compile(r"\| INFO \|   (?P<name>\w+): (?P<value>.*)$")


def _read_openclip(log: Path, content: str) -> Foreign:
    """open_clip_train's log. It writes the loss of rank 0 on every hundredth step only."""
    lines: list[dict[str, Any]] = []
    evaluated: list[dict[str, Any]] = []
    params: dict[str, str] = {}
    for text in content.splitlines():
        if match := _TRAIN.search(text):
            lines.append(_train_line(match))
        elif match := _EVAL.search(text):
            evaluated.append({"epoch": int(match["epoch"]), **_pairs(match["pairs"])})
        elif match := _PARAM.search(text):
            params[match["name"]] = match["value"]
    if not lines:
        raise ForeignError(f"{log} has no line of training; give {_KINDS}")
    batch = _global_batch(lines, params)
    per_epoch = max(1, lines[0]["of"] // batch)
    rows, attempt, before = [], 1, 0
    for line in lines:
        step = line.pop("epoch") * per_epoch + line.pop("in_epoch") // batch
        attempt += step <= before  # the run was resumed: it replays from here
        before = step
        del line["of"]
        rows.append({"step": step, "attempt": attempt, **line})
    notes = [
        f"global batch {batch} and {per_epoch} steps an epoch, as the log counts samples",
        "the loss is that of rank 0; other steps and ranks are not in the log",
    ]
    if attempt > 1:
        notes.append(f"the run was resumed {attempt - 1} times; replayed steps count once")
    evals = _openclip_evaluations(log, evaluated, per_epoch, notes)
    epochs = number(params.get("epochs"))
    warmup = number(params.get("warmup"))
    context = replace(
        _IMAGENET,
        global_batch=batch,
        warmup=int(warmup) if warmup is not None else 0,
        steps_total=int(epochs) * per_epoch if epochs else None,
    )
    return _finish(rows, notes, context, evals)


def _train_line(match: re.Match[str]) -> dict[str, Any]:
    measured = {"lr": match["lr"], "logit_scale": match["scale"], "loss": match["loss"]}
    return {
        "epoch": int(match["epoch"]),
        "in_epoch": int(match["samples"]),
        "of": int(match["of"]),
        **{name: value for name, text in measured.items() if (value := number(text)) is not None},
    }


def _global_batch(lines: Sequence[Mapping[str, Any]], params: Mapping[str, str]) -> int:
    """Samples per optimizer step: what the first line of an epoch has counted."""
    sizes = [number(params.get(name)) for name in ("batch_size", "world_size", "accum_freq")]
    if all(sizes):
        return int(math.prod(size or 1.0 for size in sizes))
    return max(1, min(int(line["in_epoch"]) for line in lines))


def _openclip_evaluations(
    log: Path, evaluated: list[dict[str, Any]], per_epoch: int, notes: list[str]
) -> list[dict[str, Any]]:
    """Accuracies of results.jsonl where it stands beside the log, else of the log (4 digits)."""
    found = [log.parent / "checkpoints" / "results.jsonl", log.parent / "results.jsonl"]
    results = next((file for file in found if file.exists()), None)
    told: list[dict[str, Any]] = evaluated
    if results is not None:
        exact = [json.loads(line) for line in results.read_text().splitlines() if line.strip()]
        if len(exact) == len(evaluated):
            told = [before | line for before, line in zip(evaluated, exact, strict=True)]
        elif not evaluated:
            told = [{"epoch": place, **line} for place, line in enumerate(exact, start=1)]
            notes.append("results.jsonl names no epochs: its lines are taken as epochs 1, 2, ...")
        else:
            notes.append("results.jsonl does not match the log and is not used")
    rows = []
    for item in told:
        row: dict[str, Any] = {"step": int(item["epoch"]) * per_epoch}
        for name, value in item.items():
            if (ours := _our_name(name)) in _EVALUATED and number(value) is not None:
                row[ours] = number(value)
        if len(row) > 1:
            rows.append(row)
    return rows


def _pairs(text: str) -> dict[str, Any]:
    """``name: value`` pairs separated by tabs."""
    parts = (part.rpartition(": ") for part in text.split("\t"))
    return {name.strip(): number(value) for name, colon, value in parts if colon}


def _our_name(name: str) -> str:
    name = name.strip()
    return _ALIASES.get(name, name)


def _is_measured(name: str) -> bool:
    prefix, slash, _ = name.partition("/")
    return (
        name in _MEASURED
        or (bool(slash) and f"{prefix}/" in _MEASURED)
        or (prefix == "grad_norm" and bool(slash))
    )


def _finish(
    rows: list[dict[str, Any]],
    notes: list[str],
    context: Context,
    evaluations: Iterable[Mapping[str, Any]] | None = None,
) -> Foreign:
    """What all sources need: temperature, accuracy, attempts, interval, and what is missing."""
    _unlog_scale(rows, notes)
    _number_attempts(rows, notes)
    evals = [dict(item) for item in evaluations or ()] or list(_split_evaluations(rows))
    _as_fractions(evals, notes)
    present = {name for row in (*rows, *evals) for name in row}
    missing = [name for name in EXPECTED if name not in present]
    if missing:
        notes.append("missing: " + ", ".join(missing))
    steps = sorted({row["step"] for row in rows})
    apart = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    interval = max(1, round(median(apart))) if apart else 1
    if interval > 1:
        notes.append(
            f"there is a row every {interval} steps only: what happens between them is not seen"
        )
    context = replace(context, row_interval=interval)
    if context.steps_total is None and steps:
        context = replace(context, steps_total=max(1, steps[-1]))
    return Foreign(rows, evals, context, notes)


def _unlog_scale(rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Our temperature is exp of the parameter; a parameter never exceeds ln 100."""
    scales = [row["logit_scale"] for row in rows if math.isfinite(row.get("logit_scale", math.nan))]
    if not scales or max(scales) > _LOG_LIMIT:
        return
    for row in rows:
        if "logit_scale" in row:
            row["logit_scale"] = math.exp(row["logit_scale"])
    notes.append(
        f"logit_scale never exceeds {max(scales):.3g}: taken as the logarithm, and exponentiated"
    )


def _number_attempts(rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Steps that go back were replayed after a resume."""
    if any("attempt" in row for row in rows):
        return
    attempt, before = 1, -math.inf
    for row in rows:
        attempt += row["step"] <= before
        before = row["step"]
        row["attempt"] = attempt
    if attempt > 1:
        notes.append(f"steps go back {attempt - 1} times: taken as resumed, the later rows count")


def _split_evaluations(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Accuracies as rows of their own; one that is repeated on every row counts once."""
    told: dict[str, Any] = {}
    filled = sum("imagenet_top1" in row for row in rows) > len(rows) / 2
    for row in rows:
        found = {name: row.pop(name) for name in _EVALUATED if name in row}
        if "imagenet_top1" in found and not (filled and found == told):
            told = found
            yield {"step": row["step"], "attempt": row["attempt"], **found}


def _as_fractions(evaluations: list[dict[str, Any]], notes: list[str]) -> None:
    names = ("imagenet_top1", "imagenet_top5")
    values = [item[name] for item in evaluations for name in names if name in item]
    if not any(value > 1.0 for value in values):
        return
    for item in evaluations:
        item.update({name: item[name] / 100.0 for name in names if name in item})
    notes.append("accuracies above 1 are taken as per cent")
