"""What a design, a search and controls ask of the factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ablate.errors import suggest
from ablate.source import Problems
from ablate.study.schema import (
    SAMPLER_OPTIONS,
    AblationPath,
    FractionalFactorial,
    LeaveOneOut,
    PlackettBurman,
    Search,
    SequentialSeeds,
    StudyFile,
)
from ablate.study.study import Factor


def check_design(file: StudyFile, factors: Sequence[Factor], problems: Problems) -> None:
    """Note what the design cannot do with these factors and seeds."""
    design = file.design
    if isinstance(design, (AblationPath, Search)) and isinstance(file.seeds, SequentialSeeds):
        problems.add(
            ("seeds",),
            f"{design.name} compares cells over all their seeds before it goes on, so seeds "
            "cannot be added later; list them, e.g. seeds: [0, 1, 2]",
        )
    by_name = {factor.name: factor for factor in factors}
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
