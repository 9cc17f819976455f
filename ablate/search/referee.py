"""Follows the runs of a search over their schedules and says which to end early.

The rules are ``ablate.search.pruning``; here is what they need of the world: evaluations are read
at the rungs, and every score with its decision is written to rungs.jsonl before anything
follows from it. A controller that is launched again takes the decisions up from there and
makes none twice.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ablate.errors import DataError, PlanError
from ablate.records.folder import StudyRecord, TrialRecord
from ablate.records.yaml_text import dotted, parse_yaml
from ablate.search.pruning import Decision, Rungs, Stratum, check_rungs, earliest_rung
from ablate.study import Prune, Search, Study
from ablate.trial.identity import Cell, Trial
from ablate.trial.recipe import Outline, Role, fields_of, load

Report = Callable[[Cell, float, float], None]
"""Tells the book a cell's score at a rung (``CellBook.report``)."""

_MOST_SCHEDULES = 10_000


class Referee:
    """One search's rungs. `report` hears the mean score of a cell's seeds at each rung.

    Raises:
        PlanError: a rung lies too early for the warmups of the study.
    """

    def __init__(
        self,
        study: Study,
        record: StudyRecord,
        *,
        report: Report = lambda cell, rung, score: None,
    ) -> None:
        rules = _rules(study)
        assert rules is not None
        self._study = study
        self._record = record
        self._report = report
        self._strata = rules.speed_sensitive
        self._rungs = Rungs(rules.rungs, warmup_fractions=_checked(study), keep=rules.keep)
        self._sign = study.objective.sign
        self._passed: dict[str, set[float]] = {}
        self._sizes: dict[tuple[str, int], int] = {}
        self._finals: set[str] = set()
        self._of_cell: dict[tuple[Any, float], dict[str, float]] = {}
        """(levels, rung) -> the scores there, by trial."""
        self._early: set[float] = set()
        """Rungs that turned out to lie within a warmup, where that was not known beforehand."""
        self.kept: set[str] = set()
        """Trials that are never ended: the baseline's, and those that a design listed."""
        self.ended: dict[str, str] = {}
        """Trials that are to be ended -> the reason."""

    def recall(self, trials: Mapping[str, Trial]) -> None:
        """Take up what earlier launches saw and decided about these trials."""
        for row in self._record.rungs():
            trial = trials.get(row["trial"])
            if trial is None:
                continue
            if "final" in row:
                self._finals.add(trial.id)
                self._rungs.finish(trial.id, self._sign * row["final"])
                continue
            if row["decision"] == _REOPENED:
                self.keep(trial, log=False)
                continue
            decision = Decision(row["decision"])
            self._passed.setdefault(trial.id, set()).add(row["rung"])
            self._rungs.recall(
                trial.id,
                self._stratum(trial, row["steps_total"]),
                row["rung"],
                self._sign * row["score"],
                decision,
                cell=trial.cell.name,
            )
            self._tell(trial, row["rung"], row["score"])
            if decision == Decision.PRUNE:
                self.ended[trial.id] = _reason(row, self._study)

    def keep(self, trial: Trial, *, log: bool) -> None:
        """Never end this trial; with `log`, although that was decided before."""
        if log:
            self._record.log_rung({"trial": trial.id, "decision": _REOPENED, "time": time.time()})
        self.kept.add(trial.id)
        self.ended.pop(trial.id, None)

    def look(self, running: Iterable[tuple[Trial, int]]) -> list[Trial]:
        """The running trials, given with their attempts, that are to be ended now."""
        found = []
        for trial, attempt in running:
            if trial.id in self.ended or len(self._passed.get(trial.id, ())) == len(
                self._rungs.rungs
            ):
                continue
            folder = self._record.record(trial.id)
            size = _size(folder.attempt_folder(attempt) / "evals.jsonl")
            if self._sizes.get((trial.id, attempt)) == size:
                continue
            if self._read(trial, folder, attempt, may_end=trial.id not in self.kept):
                self._sizes[trial.id, attempt] = size
            if trial.id in self.ended:
                found.append(trial)
        return found

    def finish(self, trial: Trial, folder: TrialRecord, score: float | None) -> None:
        """A trial has ended by itself, with this score."""
        if score is None or not math.isfinite(score) or trial.id in self._finals:
            return
        self._read(trial, folder, folder.attempts()[-1], may_end=False)
        self._finals.add(trial.id)
        self._record.log_rung({"trial": trial.id, "final": score, "time": time.time()})
        self._rungs.finish(trial.id, self._sign * score)

    def describe(self) -> tuple[str, ...]:
        """How the rungs stand, a line each, for people."""
        lines = []
        for rung in self._rungs.rungs:
            gate = self._rungs.gate(rung)
            if rung in self._early:
                state = "not in use: it lies within a warmup"
            elif math.isnan(gate.tau):
                state = f"not in use before 8 complete runs ({gate.num_runs} so far)"
            else:
                state = (
                    "in use" if gate.open else "not in use: scores there do not foretell the end"
                )
                state += f" (tau {gate.tau:.2f}, at least {gate.low:.2f}, {gate.num_runs} runs)"
            lines.append(f"rung {rung:g}: {state}")
        found = self._rungs.false_prunes()
        if found.num_canaries:
            lines.append(
                f"{found.num_canaries} would-be pruned runs were let to their end: "
                f"{found.num_false} came out among the best {self._rungs.keep:.0%} "
                f"(false prunes {found.low:.0%} to {found.high:.0%})"
                + ("" if found.tolerable else "; nothing is ended any more")
            )
        return tuple(lines)

    def _read(self, trial: Trial, folder: TrialRecord, attempt: int, *, may_end: bool) -> bool:
        """Report the rungs that a trial has newly passed; False while its length is not known."""
        steps_total = int((folder.heartbeat(attempt) or {}).get("steps_total") or 0)
        if not steps_total:
            return False
        metric = self._study.objective.metric
        rows = [row for row in folder.evaluations() if metric in row]
        passed = self._passed.setdefault(trial.id, set())
        for rung in self._rungs.rungs:
            at = next((row for row in rows if row["step"] >= rung * steps_total), None)
            if rung in passed or at is None or at["step"] >= steps_total:
                continue
            passed.add(rung)
            self._judge(trial, rung, at["step"], steps_total, float(at[metric]), may_end=may_end)
            if trial.id in self.ended:
                break
        return True

    def _judge(
        self, trial: Trial, rung: float, step: int, steps_total: int, score: float, *, may_end: bool
    ) -> None:
        warmup = _outline(self._study, trial.config).warmup / steps_total
        if rung < earliest_rung([warmup]) - 1e-9:
            self._early.add(rung)
        decision = self._rungs.report(
            trial.id,
            self._stratum(trial, steps_total),
            rung,
            self._sign * score,
            cell=trial.cell.name,
            may_end=may_end and rung not in self._early,
        )
        row = {
            "trial": trial.id,
            "rung": rung,
            "step": step,
            "steps_total": steps_total,
            "score": score,
            "decision": str(decision),
            "time": time.time(),
        }
        self._record.log_rung(row)
        self._tell(trial, rung, score)
        if decision == Decision.PRUNE:
            self.ended[trial.id] = _reason(row, self._study)

    def _tell(self, trial: Trial, rung: float, score: float) -> None:
        seeds = self._of_cell.setdefault((trial.cell.levels, rung), {})
        seeds[trial.id] = score
        self._report(trial.cell, rung, fmean(seeds.values()))

    def _stratum(self, trial: Trial, steps_total: int) -> Stratum:
        """Runs are compared within a level of each speed-sensitive factor, and at equal length."""
        levels = dict(trial.cell.levels)
        named = tuple((name, levels[name]) for name in self._strata)
        return (*named, ("steps", str(steps_total)))


_REOPENED = "reopened"


def referee_of(
    study: Study,
    record: StudyRecord,
    *,
    report: Report = lambda cell, rung, score: None,
) -> Referee | None:
    """The referee of a search that prunes; None for every other study."""
    return Referee(study, record, report=report) if _rules(study) else None


def describe(study: Study, record: StudyRecord, trials: Sequence[Trial]) -> tuple[str, ...]:
    """How the pruning of a study stands, from its folder alone; no lines where there is none."""
    if _rules(study) is None:
        return ()
    referee = Referee(study, record)
    referee.recall({trial.id: trial for trial in trials})
    return referee.describe()


def advise(study: Study) -> list[str]:
    """What a plan says about the pruning of a study.

    Raises:
        PlanError: a rung lies within the reach of a warmup; with file, line and advice.
    """
    rules = _rules(study)
    if rules is None:
        return []
    shares = _checked(study)
    rungs = ", ".join(f"{rung:g}" for rung in sorted(rules.rungs))
    notes = [
        f"runs of the search may be ended early at {rungs} of their schedule, once 8 complete runs "
        "show that scores there foretell the end; the baseline and what follows the search never "
        "are, and 1 in 10 goes to its end all the same"
    ]
    if not shares:
        notes.append(
            "whether the rungs lie behind every warmup cannot be told before the data are counted; "
            "a rung within a warmup will not be used"
        )
    fast = fields_of(load(study.recipe).Config, Role.SPEED)
    for factor in study.factors:
        if factor.name in rules.speed_sensitive or not factor.fields & fast:
            continue
        notes.append(
            f"{factor.name} changes how fast a run learns: "
            + (
                "drawn from a range, it cannot be compared within a level, so only the agreement "
                "of early and final scores guards against ending its slow values"
                if factor.range is not None
                else f"write speed_sensitive: [{factor.name}] to compare runs within its levels"
            )
        )
    return notes


def _rules(study: Study) -> Prune | None:
    return study.design.prune if isinstance(study.design, Search) else None


def _checked(study: Study) -> list[float]:
    """Warmup over schedule of everything the study may run; empty if the data are not here.

    Raises:
        PlanError: see :func:`advise`.
    """
    rules = _rules(study)
    assert rules is not None
    try:
        shares = _warmup_shares(study)
    except (DataError, OSError):
        return []
    for index, rung in enumerate(rules.rungs):
        try:
            check_rungs([rung], shares)
        except PlanError as error:
            place = ("design", "prune", "rungs", index)
            spot = parse_yaml(study.source.text, study.source.path)[1].get(place)
            line = spot.line if spot else 1
            raise PlanError(f"{study.source.path}:{line}: {dotted(place)}: {error}") from error
    return shares


def _warmup_shares(study: Study) -> list[float]:
    """Warmup over schedule for all combinations of the factors that change one of them."""

    def schedule(levels: Mapping[str, str]) -> tuple[int, int] | None:
        try:
            found = _outline(study, study.config(study.cell(levels), seed=study.seeds[0]))
        except ValueError:  # levels that contradict each other are never run
            return None
        if found.steps is None:
            raise DataError(found.no_steps or "the steps of a run are not known beforehand")
        return found.warmup, found.steps

    usual = schedule({})
    choices: list[list[tuple[str, str]]] = []
    for factor in study.factors:
        names = [level.name for level in factor.levels]
        if factor.range is not None:
            whole = factor.baseline.lstrip("-").isdigit()
            ends = (factor.range.low, factor.range.high)
            names = [factor.baseline, *(str(round(end)) if whole else repr(end) for end in ends)]
        if any(schedule({factor.name: name}) != usual for name in names):
            choices.append([(factor.name, name) for name in names])
    combinations = itertools.islice(itertools.product(*choices), _MOST_SCHEDULES)
    found = [schedule(dict(combination)) for combination in combinations]
    return [warmup / steps for warmup, steps in (item for item in found if item) if steps]


def _outline(study: Study, config: Mapping[str, Any]) -> Outline:
    recipe = load(study.recipe)
    gang = study.gang
    return recipe.outline(
        recipe.Config(**config),
        workers=gang.workers,
        gpus=gang.gpus_per_worker,
        root=Path(study.root),
    )


def _reason(row: Mapping[str, Any], study: Study) -> str:
    return (
        f"ended early at {row['step']} of {row['steps_total']} steps: {study.objective.metric} "
        f"{row['score']:.4g} there is behind the others at rung {row['rung']:g}"
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
