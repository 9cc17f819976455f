"""Logs that trainers print, and lines of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ablate.markers.event import Context
from ablate.markers.foreign.columns import quantity_of
from ablate.markers.foreign.evidence import HELD_OUT
from ablate.markers.foreign.run import ForeignError, Record, Source
from ablate.markers.foreign.steps import step_of
from ablate.markers.foreign.table import TENSORBOARD, in_columns

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)\b(?!\s*%)"
_WORD = r"[A-Za-z_][\w./-]{0,60}"  # bounded: a line may be of any length
_PAIR = re.compile(rf"(?<![\w./-])({_WORD}(?: {_WORD})?)\s*[:=]\s*({_NUMBER})", re.IGNORECASE)
_LOSS = re.compile(rf"(?<=[:,|\t])\s?loss ({_NUMBER})", re.IGNORECASE)
"""nanoGPT's ``iter 10: loss 4.2``, and PyTorch's own example after a tab."""
_BARE = re.compile(
    rf"(?<![\w./-])((?:[a-z_][\w./-]* )?(?:\w*loss|grad_norm|lr))\s+\[?({_NUMBER})", re.IGNORECASE
)
"""What ``print("step", step, "loss", loss)`` leaves."""
_BARE_LOSS = re.compile(rf"loss\s+\[?{_NUMBER}", re.IGNORECASE)
_OF = re.compile(
    r"\b(?:(?:iteration|iter|step)(?:\(train\))?\s*\[?|training\s*\[)\s*(\d+)\s*[/:|]",
    re.IGNORECASE,
)
_IN_EPOCH = re.compile(
    r"\b(?:epoch|train)(?:\(train\))?:?\s*\[?(\d+)(?:/\d+)?\]?[,\s]*"
    r"(?:\[|\[?(?:step|iter|iteration|batch):?\s*\[?)\s*(\d+)\s*[/\]]",
    re.IGNORECASE,
)
"""(epoch, step of it) as MAE's, DINO's, timm's, MMEngine's and PaddlePaddle's programs print them,
and the tutorials of PyTorch."""
_HELD_OUT = re.compile(
    rf"(?<![\w./-])(?:{'|'.join(HELD_OUT)}|validating|evaluating|testing)(?![\w./-])", re.IGNORECASE
)
_TRAINED = re.compile(r"(?<![\w./-])train(?:ing|er)?(?![\w./-])", re.IGNORECASE)
_BATCH = re.compile(r"global batch size:?\s*(\d+)", re.IGNORECASE)
_ENOUGH_LINES = 1000
"""Lines that show whether a text is a log."""
_ENOUGH = (("loss", False), ("grad_norm", False))
"""Either makes a line one of training: Megatron-LM prints no loss where it is not a number."""
_STEP = re.compile(r"(?<![\w./-])(?:step|iter|iteration)\s+\[?(\d+)\b(?!\s*[%/])", re.IGNORECASE)
"""Caffe's and scikit-learn's ``Iteration 100, loss = 4.2``."""
_EPOCH = re.compile(r"(?<![\w./-])epoch\s+\[?(\d+)\b(?!\s*%)", re.IGNORECASE)
"""That of ``Epoch 3 Step 100: ...``, where steps begin anew."""
_PROCESS = re.compile(r"\s*(?:\[?([a-z]+\d+)\]:|(\d+):(?= )|\((\w+) pid=(\d+)[^)]*\))")
"""Whose line it is: PyTorch's ``[rank0]:``, srun's ``0:``, and Ray's name and pid."""
_QUOTES = str.maketrans("", "", "\"'")
"""fairseq's lines hold JSON, and those of Hugging Face's trainer are dictionaries."""


def read_log(place: Path, text: str, *, loss: str | None = None) -> Source | None:
    """Lines with ``name: number`` pairs, as torchtitan, Megatron-LM, Chinese-CLIP and many others
    print them; None where no line has a loss, which may be called `loss`."""
    lines, notes = _of_one_process([line.translate(_QUOTES) for line in text.splitlines()])
    pairs = [_pairs(line) for line in lines]
    found = _from_pairs(place, text, lines, pairs, notes, loss)
    if found or not _BARE_LOSS.search(text):
        return found
    pairs = [_bare(line) | values for line, values in zip(lines, pairs, strict=True)]
    return _from_pairs(place, text, lines, pairs, notes, loss)


def names_of(text: str) -> list[str]:
    """What a log calls its numbers, where most of its first lines have some; else it is none."""
    lines = [line for line in text.splitlines() if line.strip()][:_ENOUGH_LINES]
    found = [names for line in lines if (names := _pairs(line.translate(_QUOTES)))]
    if len(found) * 2 < len(lines):
        return []
    return list(dict.fromkeys(name for names in found for name in names))


def _of_one_process(lines: list[str]) -> tuple[list[str], list[str]]:
    """Lines without the name of the process before them, those of others left empty; and a note."""
    marked = [_PROCESS.match(line) for line in lines]
    names = [_process(mark) for mark in marked if mark]
    several = set(names)
    changes = sum(one != other for one, other in pairwise(names))
    in_turn = len(several) == 1 or changes >= len(several)  # else steps or epochs are so written
    few = len(names) * 2 < sum(map(bool, map(str.strip, lines)))
    if not names or few or not in_turn:
        return lines, []
    first = min(several, key=lambda name: (len(name), name))
    kept = [
        line if mark is None else line[mark.end() :] if _process(mark) == first else ""
        for line, mark in zip(lines, marked, strict=True)
    ]
    if len(several) == 1:
        return kept, []
    return kept, [f"of {len(several)} processes the lines of {first} were read"]


def _process(mark: re.Match[str]) -> str:
    return " ".join(filter(None, mark.groups()))


def _from_pairs(
    place: Path,
    text: str,
    lines: Sequence[str],
    pairs: Sequence[dict[str, Any]],
    notes: Sequence[str],
    loss: str | None,
) -> Source | None:
    stepped = any(step_of(dict.fromkeys(values, 1)) and _tells(values, loss) for values in pairs)
    records: list[Record] = []
    held_out: list[Record] = []
    unread = []
    for at, (line, values) in enumerate(zip(lines, pairs, strict=True), start=1):
        if _tells(values, loss) and (step_of(dict.fromkeys(values, 1)) or not stepped):
            (held_out if _is_held_out(line) else records).append(Record(f"{place}:{at}", values))
        elif line.strip():
            unread.append(line.strip())
    records = records or held_out  # a word that stands in each line is part of a name
    if not any(_is_loss(name, loss) for record in records for name in record.values):
        return None
    notes = [*notes]
    if held_out and records is not held_out:
        notes.append(
            f"{len(held_out)} lines were measured on held-out data, and are no part of the verdict"
        )
    if unread:
        shown = unread[0][:100]
        notes.append(f"{len(unread)} lines have no step with a loss and were not read: {shown!r}")
    context = Context()
    batch = _BATCH.search(text)
    if batch and any("logit_scale" in record.values for record in records):
        context = replace(context, global_batch=int(batch[1]))
    return Source(str(place), records, context, notes)


def _pairs(line: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in _PAIR.findall(line):
        name = name.lower()
        if values.get(name, value) != value:  # never one over the other
            name += f" #{sum(other.partition(' #')[0] == name for other in values) + 1}"
        values[name] = value
    if loss := _LOSS.search(line):
        values.setdefault("loss", loss[1])
    of, within = _OF.search(line), _IN_EPOCH.search(line)
    if of and not (within and of.span(1) == within.span(2)):
        values["step"] = of[1]
    named = step_of(dict.fromkeys(values, 1)) or "step"
    if within and values.get(named, within[2]) == within[2]:
        values["epoch"], values[named] = within.groups()
    if not step_of(dict.fromkeys(values, 1)) and (step := _STEP.search(line)):
        values["step"] = step[1]
    if epoch := _EPOCH.search(line):
        values.setdefault("epoch", epoch[1])
    return values


def _bare(line: str) -> dict[str, Any]:
    return {name.lower(): value for name, value in _BARE.findall(line)}


def _is_held_out(line: str) -> bool:
    """Whether the words before the first number pair say that a line is no line of training."""
    pair = _PAIR.search(line)
    before = line[: pair.start()] if pair else line
    return bool(_HELD_OUT.search(before)) and not _TRAINED.search(before)


def _is_loss(name: str, chosen: str | None) -> bool:
    return name == chosen or quantity_of(name)[0] == "loss"


def _tells(values: Mapping[str, Any], loss: str | None) -> bool:
    """Whether a line speaks of a step of training."""
    return any(name == loss or quantity_of(name) in _ENOUGH for name in values)


def read_json(place: Path, text: str) -> Source | None:
    """A file of one JSON object a line, a list of them, or Hugging Face's trainer_state.json;
    None where it is none of these.

    Raises:
        ForeignError: a line in the middle that is no JSON.
    """
    begin = text.lstrip()[:2]
    if begin[:1] not in ("{", "["):
        return None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        lines = _read_lines(place, text) if begin.startswith("{") else None
        ended = text.rstrip().endswith(("}", "]")) and error.pos < len(text.rstrip()) - 1
        if lines is None and begin in ('{"', "[{") and not ended:
            raise ForeignError(f"{place}:{error.lineno}: the JSON is cut here") from None
        return lines
    except (ValueError, RecursionError) as error:
        raise ForeignError(f"{place}: JSON that holds no run ({error})") from None
    if isinstance(whole, Mapping):
        whole = _listed(whole)
    found = list(_records(place, enumerate(whole, start=1)))
    if not found:
        raise ForeignError(
            f"{place}: no loss was found, and without one there is no verdict; it is JSON without "
            'records; give a list of them, or one a line: {"step": 1, "loss": 2.3}'
        )
    return Source(str(place), in_columns(place, found))


def _listed(whole: Mapping[str, Any]) -> list[Any]:
    """The records of an object: the one list of them in it, such as Hugging Face's log_history
    and the metrics of MLflow, or its lists side by side, such as Keras' history."""
    lists = [
        value
        for value in whole.values()
        if isinstance(value, list) and value and isinstance(value[0], Mapping)
    ]
    return lists[0] if len(lists) == 1 else _by_place(whole)


def _by_place(whole: Mapping[str, Any]) -> list[Any]:
    """A mapping of lists of one length, such as Keras' history, as records."""
    lists = {name: value for name, value in whole.items() if isinstance(value, list)}
    if not lists or len({len(value) for value in lists.values()}) > 1:
        return [whole]
    return [dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)]


def _read_lines(place: Path, text: str) -> Source | None:
    notes, found = [], []
    lines = [(k, line) for k, line in enumerate(text.splitlines(), start=1) if line.strip()]
    for at, line in lines:
        try:
            found.append((at, json.loads(line)))
        except (ValueError, RecursionError):
            if at == lines[0][0]:
                return None
            if at != lines[-1][0]:
                raise ForeignError(
                    f"{place}:{at}: no JSON: {line[:60]!r}; give one object a line"
                ) from None
            notes.append("the last line is cut and was not read")
    return Source(str(place), list(_records(place, found)), notes=notes)


def _records(place: Path, found: Iterable[tuple[int, Any]]) -> Iterable[Record]:
    for at, item in found:
        if isinstance(item, Mapping):
            yield Record(f"{place}:{at}", dict(_flat(item)))
        elif isinstance(item, list) and len(item) == 3:  # TensorBoard's own: time, step, value
            yield Record(f"{place}:{at}", dict(zip(TENSORBOARD, item, strict=True)))


def _flat(item: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and texts of an object, those of an object within it as ``outer/inner``."""
    for name, value in item.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}/")
        elif value is None or (
            isinstance(value, int | float | str) and not isinstance(value, bool)
        ):
            yield f"{before}{name}", value
