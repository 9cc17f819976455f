"""Reading runs that were made elsewhere, so that the markers can judge them.

``read_foreign(path)`` takes what people have:

- a CSV with a header, or a parquet file: a column a quantity (``step``, ``loss``, ``grad_norm``,
  ``logit_scale``, ``lr``, and what else the markers read) under the names that
  trainers and trackers give them, W&B's history and panels, MLflow's and TensorBoard's exports;
- lines of JSON, and Hugging Face's ``trainer_state.json``;
- logs that print ``name: number`` (torchtitan, Megatron-LM, Chinese-CLIP, ...);
- TensorBoard event files, or a folder with those of one run (needs the tensorboard package);
- what a trainer that a recipe knows leaves: its log, its names of accuracies.

A verdict needs evidence: a source without a loss is refused, and so is one in which two series may
be the loss. What was assumed, converted or left out is said in ``Foreign.notes``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ablate.markers.event import Context
from ablate.markers.foreign.columns import EXPECTED, rows_of
from ablate.markers.foreign.events import read_events
from ablate.markers.foreign.evidence import refuse_no_course
from ablate.markers.foreign.finish import finish
from ablate.markers.foreign.run import Evaluated, Foreign, ForeignError, Trainer
from ablate.markers.foreign.table import read_parquet, read_table
from ablate.markers.foreign.text import names_of, read_json, read_log
from ablate.markers.judge import judge
from ablate.markers.thresholds import Thresholds
from ablate.records.source import read_text

__all__ = ["EXPECTED", "Foreign", "ForeignError", "Trainer", "judge_foreign", "read_foreign"]

_TABLES = ("metrics.csv", "trainer_state.json", "summary.csv", "progress.csv", "log.txt")
"""What Lightning, Hugging Face, timm, Stable Baselines and MAE leave in the folder of a run."""

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What terminals take for a colour, or for a place to go to."""


def judge_foreign(
    path: str | Path,
    *,
    global_batch: int | None = None,
    warmup: int | None = None,
    columns: Mapping[str, str] | None = None,
    trainers: Sequence[Trainer] = (),
    thresholds: Thresholds | None = None,
) -> dict[str, Any]:
    """The verdict on a run made elsewhere, JSON-able, with ``notes`` on how it was read.

    ``global_batch`` (samples per softmax, all workers together) and ``warmup`` (steps)
    overrule what the source says of them; ``columns`` says which column is which quantity, and
    ``trainers`` are those whose own files are recognised.
    """
    run = read_foreign(path, columns=columns, trainers=trainers)
    refuse_no_course(str(path), run.rows)
    context, notes = run.context, list(run.notes)
    if global_batch is not None:
        context = replace(context, global_batch=global_batch)
    if warmup is not None:
        context = replace(context, warmup=warmup)
    if context.global_batch is None:
        context = replace(context, in_nats=False)
        notes.append(
            "the global batch size is not known: a loss at chance level cannot be seen, and rises "
            "are measured in shares of where the loss began"
        )
    if warmup is None and context.warmup == 0:
        notes.append("the length of the warm-up is not known and taken as 0")
    judgement = judge(run.rows, run.evaluations, thresholds=thresholds, context=context)
    return judgement.to_dict() | {"notes": notes}


def read_foreign(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    trainers: Sequence[Trainer] = (),
) -> Foreign:
    """Read a run made elsewhere; raises ForeignError when there is none."""
    place, chosen, evaluated = Path(path), columns or {}, Evaluated(trainers)
    if not place.exists():
        raise ForeignError(f"{place} does not exist; give {_kinds(evaluated)}")
    if place.is_dir():
        patterns = [pattern for trainer in trainers for pattern in trainer.logs]
        logs = [log for pattern in patterns for log in sorted(place.glob(pattern))]
        if logs:
            return read_foreign(logs[0], columns=chosen, trainers=trainers)
        files = sorted(place.rglob("*tfevents*"))
        if not files:
            return read_foreign(_table_below(place, evaluated), columns=chosen, trainers=trainers)
        return _from_events(files, chosen, evaluated)
    if "tfevents" in place.name:
        return _from_events([place], chosen, evaluated)
    if place.suffix == ".parquet" or _begins(place, b"PAR1"):
        source = read_parquet(place)
        source.evaluated = evaluated
        return finish(rows_of(source, chosen), source.notes, source.context, evaluated)
    text = read_text(place, error=ForeignError, errors="replace")
    if run := next((run for each in trainers if (run := each.read(place, text))), None):
        return run
    text = _COLOUR.sub("", text)
    lines = text.splitlines(keepends=True)
    whole = [line for line in lines if "\0" not in line]
    torn = len(lines) - len(whole) if whole else 0
    if torn:
        text = "".join(whole)
    found = read_json(place, text)
    if found is None:
        lower = {quantity: name.lower() for quantity, name in chosen.items()}
        found = read_log(place, text, loss=lower.get("loss"))
        chosen = lower if found else chosen
    if found is None and (names := names_of(text)):
        raise ForeignError(
            f"{place}: no loss was found, and without one there is no verdict; its numbers are "
            f"called {', '.join(names[:20])}. Say which is the loss: --column loss=NAME"
        )
    source = found or read_table(place, text)
    source.evaluated = evaluated
    if torn:
        source.notes.append(
            f"{torn} lines hold zero bytes, as a crash or a full disk leaves them: not read"
        )
    try:
        rows = rows_of(source, chosen)
    except ForeignError as error:
        if found is None and "no loss was found" in str(error):
            raise ForeignError(f"{error}. Read are: {_kinds(evaluated)}") from None
        raise
    return finish(rows, source.notes, source.context, evaluated)


def _begins(place: Path, mark: bytes) -> bool:
    if not place.is_file():
        return False
    with place.open("rb") as file:
        return file.read(len(mark)) == mark


def _table_below(folder: Path, evaluated: Evaluated) -> Path:
    """The one table of a folder that trainers leave there."""
    for name in _TABLES:
        found = [folder / name] if (folder / name).exists() else sorted(folder.rglob(name))
        if len(found) == 1:
            return found[0]
        if found:
            shown = ", ".join(map(str, found[:5]))
            raise ForeignError(
                f"{len(found)} runs lie below one folder ({shown}); give one of them"
            )
    raise ForeignError(
        f"{folder} has neither a log that is known nor event files, and no "
        f"{' or '.join(_TABLES)}; give {_kinds(evaluated)}"
    )


def _kinds(evaluated: Evaluated) -> str:
    columns = ", ".join(("step", *EXPECTED, *evaluated.accuracies))
    kinds = [
        f"a CSV with the columns {columns}",
        "TensorBoard event files",
        "lines of JSON",
        "a log of name: number pairs",
        *(trainer.kind for trainer in evaluated.trainers),
    ]
    return f"{', '.join(kinds[:-1])}, or {kinds[-1]}"


def _from_events(files: list[Path], chosen: Mapping[str, str], evaluated: Evaluated) -> Foreign:
    source, evaluations = read_events(files, evaluated)
    rows = rows_of(source, chosen)
    if rows and evaluations and 0 < evaluations[-1]["step"] * 5 < rows[-1]["step"]:
        # some trainers number evaluations by epoch; the last one stands at the run's end
        per_epoch = max(1, round(rows[-1]["step"] / evaluations[-1]["step"]))
        evaluations = [{**item, "step": item["step"] * per_epoch} for item in evaluations]
        source.notes.append(f"evaluations are numbered by epoch: one taken as {per_epoch} steps")
    known = next((each.context for each in evaluated.trainers if each.wrote(files)), Context())
    return finish(rows, source.notes, known, evaluated, evaluations)
