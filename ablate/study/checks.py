"""What the objective asks of the recipe; a design, a search and controls of the factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ablate.analysis.hypothesis import Expectation
from ablate.errors import suggest
from ablate.records.source import Problems
from ablate.study.schema import (
    SAMPLER_OPTIONS,
    AblationPath,
    FractionalFactorial,
    LeaveOneOut,
    Objective,
    PlackettBurman,
    Search,
    SequentialSeeds,
    StudyFile,
)
from ablate.study.study import Factor
from ablate.trial.metrics import COSTS, METRICS, Direction, Metric
from ablate.trial.recipe import describe


def resolve_objective(
    file: StudyFile, declared: tuple[Metric, ...], problems: Problems
) -> Objective:
    """The objective with what the recipe declares; notes a metric or cost that is not known."""
    asked = file.objective
    if not declared:
        problems.add(("objective",), f"recipe {file.recipe} measures nothing to be judged by")
        return asked
    metric = asked.metric or declared[0].name
    known = [entry.name for entry in declared]
    entry = describe(declared, metric)  # also of knn_top1/NAME
    if entry is None:
        problems.add(("objective",), f"metric {metric!r} is not known; {suggest(metric, known)}")
    if entry is not None and entry.unit == "fraction" and asked.margin >= 1:
        problems.add(
            ("objective", "margin"),
            f"{metric} is a share between 0 and 1, and no two differ by more than "
            f"{asked.margin:g}; write {asked.margin / 100:g} for {asked.margin:g} points",
        )
    direction: Direction = asked.direction
    if entry is not None and entry.direction and entry.direction != direction:
        if "direction" in asked.model_fields_set:
            problems.add(
                ("objective",),
                f"{metric} is better the other way: set direction: {entry.direction}",
            )
        direction = entry.direction
    cost_direction: Direction = "minimize"
    if asked.cost is not None:
        costs = [name for name in (*COSTS, *known) if name != metric]
        found = METRICS[asked.cost] if asked.cost in COSTS else describe(declared, asked.cost)
        if found is None:
            why = f"cost {asked.cost!r} is not measured; {suggest(asked.cost, costs)}"
            problems.add(("objective",), why)
        elif asked.cost == metric:
            why = f"cost {asked.cost!r} is the metric itself; {suggest('', costs)}"
            problems.add(("objective",), why)
        else:
            cost_direction = found.direction or "minimize"
    if asked.heldout is not None:
        chooser = describe(declared, asked.heldout)
        others = [name for name in known if name != metric]
        if chooser is None:
            why = f"heldout {asked.heldout!r} is not measured; {suggest(asked.heldout, others)}"
            problems.add(("objective", "heldout"), why)
        elif (chooser.direction or direction) != direction or asked.heldout == metric:
            why = f"heldout {asked.heldout} cannot choose for {metric}; {suggest('', others)}"
            problems.add(("objective", "heldout"), why)
    return asked.resolved(metric=metric, direction=direction, cost_direction=cost_direction)


def _check_ladder(
    file: StudyFile, known: Iterable[str], factors: Sequence[Factor], problems: Problems
) -> None:
    """Note rungs that change nothing, what is no field, or what a factor varies."""
    known = list(known)
    varied = {name: factor.name for factor in factors for name in (factor.name, *factor.fields)}
    for number, changes in enumerate(file.ladder):
        place = ("ladder", number)
        if not changes:
            problems.add(place, "the rung changes nothing; name a field, e.g. {epochs: 1}")
        for name in changes:
            if name in varied:
                problems.add(place, f"factor {varied[name]!r} sets {name}; a rung changes what all "
                             "cells share")  # fmt: skip
            elif name not in known:
                problems.add(place, f"{name!r} is no field of the baseline; {suggest(name, known)}")


def check_design(
    file: StudyFile, factors: Sequence[Factor], problems: Problems, *, fields: Iterable[str]
) -> None:
    """Note what the design, or a rung, cannot do with these factors, seeds and fields."""
    _check_ladder(file, fields, factors, problems)
    design = file.design
    if isinstance(design, (AblationPath, Search)) and isinstance(file.seeds, SequentialSeeds):
        problems.add(
            ("seeds",),
            f"{design.name} compares cells over all their seeds before it goes on, so seeds "
            "cannot be added later; list them, e.g. seeds: [0, 1, 2]",
        )
    by_name = {factor.name: factor for factor in factors}
    _check_conditions(file, by_name, problems)
    if not isinstance(design, Search):
        for factor in factors:
            if factor.range is not None:
                problems.add(
                    ("factors", factor.name),
                    f"a range can only be searched, and the design is {design.name}; "
                    "list the values to compare, or set design: search",
                )
    if isinstance(design, Search):
        _check_search(file, design, by_name, problems)
    if isinstance(design, (LeaveOneOut, AblationPath)):
        for name, level in design.target.items():
            if name not in by_name:
                problems.add(
                    ("design", "target", name),
                    f"{name!r} is not a factor; {suggest(name, by_name)}",
                )
                continue
            levels = [item.name for item in by_name[name].levels]
            if level not in levels:
                problems.add(
                    ("design", "target", name),
                    f"{level!r} is no level of {name}; {suggest(level, levels)}",
                )
    if isinstance(design, (FractionalFactorial, PlackettBurman)):
        three = isinstance(design, FractionalFactorial) and design.resolution == "III"
        allowed = "two or three levels" if three else "two levels"
        for factor in factors:
            count = len(factor.distinct())
            if factor.range is None and count > (3 if three else 2):
                hint = ""
                if count == 3 and isinstance(design, FractionalFactorial):
                    hint = " (resolution III takes three levels, too)"
                problems.add(
                    ("factors", factor.name),
                    f"{design.name} needs {allowed} of every factor, {factor.name} has {count} "
                    f"different ones{hint}; leave some out, or set design: one_at_a_time",
                )


def _check_conditions(file: StudyFile, by_name: Mapping[str, Factor], problems: Problems) -> None:
    for factor in by_name.values():
        place = ("factors", factor.name, "only_if")
        if factor.only_if and not isinstance(file.design, Search):
            problems.add(
                place,
                f"only a search varies a factor under a condition, and the design is "
                f"{file.design.name}; leave only_if out, or set design: search",
            )
        for name, wanted in factor.only_if.items():
            other = by_name.get(name)
            if other is None:
                continue  # what is wrong with it has been said
            if other.range is not None:
                problems.add(place, f"{name} is a range and has no level; list its values")
                continue
            if other.only_if:
                problems.add(place, f"{name} stands under a condition itself; name that one's")
            levels = [item.name for item in other.levels]
            for level in wanted:
                if level not in levels:
                    problems.add(
                        place, f"{level!r} is no level of {name}; {suggest(level, levels)}"
                    )


def _check_search(
    file: StudyFile, design: Search, by_name: Mapping[str, Factor], problems: Problems
) -> None:
    allowed = sorted(SAMPLER_OPTIONS[design.sampler])
    for name in design.options:
        if name not in allowed:
            problems.add(
                ("design", "options", name),
                f"sampler {design.sampler} has no option {name!r}; "
                + (suggest(name, allowed) if allowed else "it takes none"),
            )
    ranged = [name for name, factor in by_name.items() if factor.range is not None]
    if design.sampler == "grid" and ranged:
        problems.add(
            ("factors", ranged[0]),
            "sampler grid needs listed levels; list the values, or take sampler: qmc",
        )
    if design.prune is None:
        return
    place = ("design", "prune")
    if file.objective.cost is not None:
        problems.add(
            place,
            "runs are compared by their score alone, so the cheap ones of a search that weighs "
            f"{file.objective.cost} would be ended for it; remove prune or objective.cost",
        )
    for index, name in enumerate(design.prune.speed_sensitive):
        where = (*place, "speed_sensitive", index)
        if name not in by_name:
            problems.add(where, f"{name!r} is not a factor; {suggest(name, by_name)}")
        elif name in ranged:
            problems.add(
                where,
                f"{name} is drawn from a range, so no two runs share its level; list its values",
            )


def parse_hypothesis(
    file: StudyFile, factors: Sequence[Factor], problems: Problems
) -> tuple[Expectation, ...]:
    """What is expected of which level; notes names that are none, and the baseline's own level."""
    by_name = {factor.name: factor for factor in factors}
    found = []
    for key, expected in file.hypothesis.items():
        name, _, level = key.partition("=")
        where = ("hypothesis", key)
        if name not in by_name:
            problems.add(where, f"{name!r} is not a factor; {suggest(name, by_name)}")
            continue
        levels = [item.name for item in by_name[name].levels]
        usual = by_name[name].baseline
        if level and level == usual:
            problems.add(
                where, f"{key} is the baseline's own level: say what you expect of another"
            )
        elif level and level not in levels:
            problems.add(where, f"{level!r} is no level of {name}; {suggest(level, levels)}")
        found.append(Expectation(name, level or None, expected))
    if found and isinstance(file.design, Search):
        problems.add(
            ("hypothesis",),
            "a search chooses its cells by their scores, so it tests nothing that was expected: "
            "leave hypothesis out, or list the levels under another design",
        )
    return tuple(found)


def check_controls(file: StudyFile, factors: Sequence[Factor], problems: Problems) -> None:
    """Note controls that are no level of a factor."""
    by_name = {factor.name: [item.name for item in factor.levels] for factor in factors}
    for name, levels in file.controls.items():
        if name not in by_name:
            if not problems.at(("factors", name)):
                problems.add(
                    ("controls", name), f"{name!r} is not a factor; {suggest(name, by_name)}"
                )
            continue
        for level in levels:
            if level not in by_name[name]:
                problems.add(
                    ("controls", name),
                    f"{level!r} is no level of {name}; {suggest(level, by_name[name])}",
                )
