"""The runs of cells: what their seeds come to, with its curves, and the verdict on it."""

from __future__ import annotations

from ablate.tracking.mlflow import runs
from ablate.tracking.mlflow.curves import Curves, curves_of, spread_of
from ablate.tracking.mlflow.door import Door
from ablate.tracking.mlflow.inputs import inputs_of
from ablate.tracking.mlflow.known import Known
from ablate.tracking.mlflow.notes import cell_note
from ablate.tracking.mlflow.rows import begun_first, milliseconds
from ablate.tracking.mlflow.runs import CellRun
from ablate.trial.identity import Levels, Outcome, Trial


def sync_cell(door: Door, known: Known, levels: Levels, *, closing: bool) -> None:
    """Tell what a cell's first seeds come to, once for each number of seeds; all seeds: its curves.

    A curve cannot be told again, so a cell that gets more seeds after it, or fewer, begins anew.
    """
    trials = runs.in_order_of_seeds(known.study, known.by_cell[levels])
    if not any(trial.id in known.runs for trial in trials):
        return
    first = known.first_ended(levels)
    counted = [known.ended[trial.id] for trial in first]
    is_whole = len(counted) == len(trials)
    cell = known.cells.get(levels)
    if cell is not None and (
        len(counted) < cell.seeds or (cell.is_drawn and len(counted) > cell.seeds)
    ):
        door.delete(cell.run_id)
        cell = None
    cell = cell or _create(door, known, levels)
    metrics = runs.cell_numbers(counted, known=cell.seeds, measures=known.measures)
    draws = is_whole and not cell.is_drawn
    if draws:
        metrics += spread_of([_curves(known, t) for t in first if _is_drawn(known, t)] or [{}],
                             known.measures)  # fmt: skip
    ended = [known.ended[trial.id] for trial in trials if trial.id in known.ended]
    running = sum(t.id in known.runs and t.id not in known.ended for t in trials)
    tags = runs.cell_state(ended, running=running)
    effect = known.answer.effects.get(levels) if known.answer is not None else None
    if effect is not None:
        tags |= {"verdict": effect.verdict, "difference": effect.difference}
    tags["mlflow.note.content"] = cell_note(
        effect,
        [(t.seed, known.run_id(t), known.result(t)) for t in trials],
        measures=known.measures,
        experiment=door.experiment,
    )
    drawn = " drawn" if cell.is_drawn or draws else ""
    tags[runs.PROGRESS] = f"{len(counted)}{drawn}"  # last of all
    changed = runs.changed_tags(tags, cell.tags)
    params = {} if cell.described else known.setting(levels)
    door.log(cell.run_id, metrics=metrics, params=params, tags=changed)
    cell.described, cell.is_drawn, cell.seeds = True, bool(drawn), len(counted)
    cell.tags.update(changed)
    if is_whole:
        for trial in trials:
            known.curves.pop(trial.id, None)
    door.set_status(
        cell,
        runs.cell_status(ended, is_whole=is_whole, closing=closing),
        when=max(item.time for item in ended) if is_whole else None,
    )


def _create(door: Door, known: Known, levels: Levels) -> CellRun:
    study = known.study
    tags = runs.cell_tags(study, levels, name=known.by_cell[levels][0].cell.name)
    name = study.change_name(dict(levels))
    start = begun_first(known.record.record(trial.id) for trial in known.by_cell[levels])
    run = door.create(name, tags, start=milliseconds(start))
    config = study.config(study.cell(dict(levels)), seed=study.seeds[0])
    door.log_inputs(run.info.run_id, list(inputs_of(study.recipe, config).values()))
    made = known.cells[levels] = CellRun(run.info.run_id, "RUNNING", tags=dict(run.data.tags))
    return made


def _is_drawn(known: Known, trial: Trial) -> bool:
    return trial.id not in known.unreadable and Outcome(known.ended[trial.id].result.outcome).scored


def _curves(known: Known, trial: Trial) -> Curves:
    """As they were kept when the trial was told, else from its logs."""
    kept = known.curves.get(trial.id)
    if kept is not None:
        return kept
    folder = known.record.record(trial.id)
    return curves_of(folder.trace(), folder.evaluations(), known.measures)
