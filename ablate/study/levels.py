"""The factors of a study file: levels, nuisance settings, and levels that are one experiment."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from ablate.errors import suggest
from ablate.records.names import BASELINE, find_fault
from ablate.records.source import Problems
from ablate.records.yaml_text import name_template
from ablate.study.schema import LAST_SEED, Nuisance, Range, Search, StudyFile, wrong_seed
from ablate.study.study import Candidates, Factor, Level, name_level
from ablate.trial.recipe import Recipe, Role, fields_of, find_ability
from ablate.trial.same import Sameness, same_experiment

_MOST_SETTINGS = 1024
"""Up to this many settings of other factors are gone through to prove that levels are the same."""

_Named = list[tuple[str, dict[str, Any], tuple[Any, ...]]]
"""(level name, fields, place in the file) of each level of a factor."""


def parse_factors(
    file: StudyFile,
    recipe: Recipe,
    resolved: Mapping[str, Any],
    problems: Problems,
) -> tuple[Factor, ...]:
    """The factors as written, each level tried against the recipe; problems are noted."""
    factors = []
    owner: dict[str, str] = {}  # field -> the factor that sets it
    for name, spec in file.factors.items():
        spec, only_if = _split_condition(name, spec, file, problems)
        factor = _parse_factor(name, spec, file, recipe, resolved, problems)
        if factor is None:
            continue
        factor = replace(factor, only_if=only_if)
        for key in sorted(factor.fields):
            if owner.get(key) in only_if:
                continue  # where both count, the condition's level is the wider one
            if key in owner:
                problems.add(
                    ("factors", name),
                    f"factors {owner[key]!r} and {name!r} both set {key}, so their levels "
                    f"contradict each other; let one factor set {key}",
                )
            owner[key] = name
        factors.append(factor)
    return tuple(factors)


def _split_condition(
    name: str, spec: Any, file: StudyFile, problems: Problems
) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """A factor without its `only_if`, and that condition: other factor -> levels."""
    if not isinstance(spec, Mapping) or "only_if" not in spec:
        return spec, {}
    place = ("factors", name, "only_if")
    rest = {key: value for key, value in spec.items() if key != "only_if"}
    rest = rest["values"] if set(rest) == {"values"} else rest
    if not isinstance(spec["only_if"], Mapping) or not spec["only_if"]:
        problems.add(place, "write the factor it hangs on and its level: {augmentation: strong}")
        return rest, {}
    found = {}
    for other, wanted in spec["only_if"].items():
        listed = wanted if isinstance(wanted, list) else [wanted]
        others = [factor for factor in file.factors if factor != name]
        if other not in others:
            problems.add(place, f"{other!r} is no other factor; {suggest(str(other), others)}")
        else:
            found[str(other)] = tuple(name_level(level) for level in listed)
    return rest, found


def _parse_factor(
    name: str,
    spec: Any,
    file: StudyFile,
    recipe: Recipe,
    resolved: Mapping[str, Any],
    problems: Problems,
) -> Factor | None:
    place = ("factors", name)
    if fault := _fault_of(name):
        problems.add(place, fault)
        return None
    if isinstance(spec, Mapping) and "low" in spec and "high" in spec:
        return _parse_range(name, spec, file, recipe, resolved, problems)
    if isinstance(spec, Mapping) and not spec.keys().isdisjoint(("low", "high", "log")):
        problems.add(
            place,
            f"a range is {{low: ..., high: ...}}, and may say log: true; this has "
            f"{', '.join(map(str, spec))}. Levels of these names would look like one: call them "
            "otherwise",
        )
        return None
    named = _named_levels(name, spec, file, recipe, resolved, problems)
    if named is None:
        return None
    if not named:
        problems.add(place, "the factor has no level; list at least two values")
        return None
    levels, baseline_name = _parse_levels(name, spec, named, file, recipe, resolved, problems)
    if len(levels) < 2 and not problems.at(place):
        problems.add(
            place,
            f"the only level, {baseline_name!r}, is the baseline itself; add a level to compare",
        )
        return None
    return Factor(name, tuple(levels), baseline_name)


def _fault_of(name: str) -> str:
    """Why no factor may have this name; empty where one may."""
    if name == "seed":
        return "seeds are replicates, never a factor; list them under seeds"
    if fault := find_fault(name):
        return fault
    if name.casefold() == BASELINE:
        return "the baseline is the setting without any factor; give the factor another name"
    return ""


def _parse_levels(
    name: str,
    spec: Any,
    named: _Named,
    file: StudyFile,
    recipe: Recipe,
    resolved: Mapping[str, Any],
    problems: Problems,
) -> tuple[list[Level], str]:
    """The levels that are sound and differ, the baseline's among them, and the name of that."""
    levels: list[Level] = []
    seen: dict[str, str] = {}  # resolved configuration -> level name
    baseline_name: str | None = None
    for level_name, fields, where in named:
        if fault := find_fault(level_name, derived=isinstance(spec, list)):
            _name_it(where, level_name, fault, spec, problems)
            continue
        config = resolve(recipe, file.baseline, fields, problems, where)
        if config is None:
            continue
        key = json.dumps(config, sort_keys=True)
        if key in seen:
            problems.add(
                where,
                f"level {level_name!r} is the same experiment as level {seen[key]!r}; remove one",
            )
            continue
        if level_name in seen.values():
            why = f"two different levels are called {level_name!r}"
            _name_it(where, level_name, why, spec, problems)
            continue
        if level_name.casefold() == BASELINE and config != resolved:
            problems.add(where, _another_name(name, level_name, config, resolved))
            continue
        seen[key] = level_name
        if config == resolved:
            baseline_name = level_name
        levels.append(Level(level_name, tuple(sorted(fields.items()))))
    if baseline_name is None:
        # A list such as lr: [3e-3] asks for these values against the baseline's own.
        value = resolved.get(name)
        baseline_name = name_level(value) if name in resolved else BASELINE
        for level_name, fields, where in named:
            if level_name == baseline_name and not problems.at(where):
                config = resolve(recipe, file.baseline, fields, problems, where) or {}
                problems.add(where, _another_name(name, level_name, config, resolved))
        levels.insert(0, Level(baseline_name, ()))
    return levels, baseline_name


def _name_it(where: tuple[Any, ...], level: str, fault: str, spec: Any, problems: Problems) -> None:
    """Note a level's name that will not do; of a listed value the way to give it another."""
    advice = ""
    if isinstance(spec, list):
        advice = f"; give it a name of its own: {{NAME: {{{where[1]}: ...}}, ...}}"
    problems.add(where, fault + advice)


def _another_name(
    factor: str, level: str, config: Mapping[str, Any], resolved: Mapping[str, Any]
) -> str:
    """That a level has the baseline's name and sets something else."""
    sets = ", ".join(
        f"{key} {name_level(value)}" for key, value in config.items() if resolved.get(key) != value
    )
    return (
        f"level {level!r} of {factor} has the baseline's name and is not the baseline (it sets "
        f"{sets}); give it another name"
    )


def _named_levels(
    name: str,
    spec: Any,
    file: StudyFile,
    recipe: Recipe,
    resolved: Mapping[str, Any],
    problems: Problems,
) -> _Named | None:
    """(level name, fields, place in the file) of a list of values or of named levels."""
    place = ("factors", name)
    known = _fields(resolved)
    advise = partial(_advise, recipe, resolved)
    named: _Named
    if isinstance(spec, list):
        if name not in known:
            problems.add(
                place,
                f"{name!r} is no field of the {file.recipe} recipe; {advise(name)}. "
                "A factor with a name of its own needs named levels: "
                "{level name: {field: value, ...}, ...}",
            )
            return None
        named = [(name_level(value), {name: value}, (*place, i)) for i, value in enumerate(spec)]
    elif isinstance(spec, Mapping):
        named = []
        for level, fields in spec.items():
            if not isinstance(fields, Mapping):
                if name not in known:
                    problems.add(
                        (*place, level),
                        f"level {level!r} must be a mapping of fields, not {fields!r}",
                    )
                    continue
                fields = {name: fields}
            named.append((str(level), dict(fields), (*place, level)))
    else:
        problems.add(
            place,
            f"levels must be a list of values or named levels, not {spec!r}; "
            f"write {name}: [{name_level(spec)}, ...]",
        )
        return None
    return named


def _fields(resolved: Mapping[str, Any]) -> list[str]:
    """Those of the recipe, and those that the baseline adds where a recipe takes any."""
    return [field for field in resolved if field != "seed"]


def _advise(recipe: Recipe, resolved: Mapping[str, Any], name: str) -> str:
    """What to write instead of a name that is no field."""
    elsewhere: Mapping[str, str] = getattr(recipe.Config, "ELSEWHERE", {})
    return elsewhere.get(name) or suggest(name, _fields(resolved))


def _parse_range(
    name: str,
    spec: Mapping[str, Any],
    file: StudyFile,
    recipe: Recipe,
    resolved: Mapping[str, Any],
    problems: Problems,
) -> Factor | None:
    place = ("factors", name)
    if name not in _fields(resolved):
        advice = _advise(recipe, resolved, name)
        problems.add(place, f"{name!r} is no field of the recipe; {advice}")
        return None
    try:
        span = Range.model_validate(dict(spec))
    except ValidationError as error:
        problems.add_validation(error, place, Range)
        return None
    value = resolved[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        problems.add(place, f"{name} is not a number, so it cannot be drawn from a range")
        return None
    for end, drawn in (("low", span.low), ("high", span.high)):
        if fault := _fault_of_end(name, drawn, file.baseline, recipe, whole=isinstance(value, int)):
            problems.add((*place, end), fault)
    return None if problems.at(place) else Factor(name, (), name_level(value), span)


def _fault_of_end(
    name: str, drawn: float, baseline: Mapping[str, Any], recipe: Recipe, *, whole: bool
) -> str:
    """Why a range may not end there; what other fields say against it is not asked."""
    if whole and drawn != int(drawn):
        return f"{name} is a whole number in the baseline, and {drawn:g} is none"
    try:
        recipe.Config(**{**baseline, name: int(drawn) if whole else drawn})
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["loc"][:1] == (name,):
                return f"{name} {item['msg'].replace('Input should', 'should')}, not {drawn:g}"
    return ""


def parse_nuisance(
    file: StudyFile,
    recipe: Recipe,
    resolved: Mapping[str, Any],
    factors: Sequence[Factor],
    seeds: Sequence[int],
    problems: Problems,
) -> tuple[tuple[Factor, ...], Candidates]:
    """The nuisance settings as factors, and the candidates as levels of them."""
    spec = file.nuisance
    if spec is None:
        return (), Candidates()
    place = ("nuisance",)
    known = _fields(resolved)
    advise = partial(_advise, recipe, resolved)
    taken = {key: factor.name for factor in factors for key in (*factor.fields, factor.name)}
    for name, span in spec.settings.items():
        here = (*place, "settings", name)
        if name not in known:
            problems.add(here, f"{name!r} is no field of the recipe; {advise(name)}")
        elif name in taken:
            problems.add(
                here, f"factor {taken[name]!r} sets {name}, too; compare it or tune it, not both"
            )
        elif isinstance(span, Range) and not isinstance(resolved[name], (int, float)):
            problems.add(here, f"{name} is not a number; list the values to try")
        elif isinstance(span, list) and len(span) < 2:
            problems.add(here, "list at least two values to choose from")
    ranges = [name for name, span in spec.settings.items() if isinstance(span, Range)]
    if ranges and spec.points is None:
        problems.add(place, f"{ranges[0]} is a range: say how many points to try, e.g. points: 3")
    if not ranges and spec.points is not None:
        problems.add(
            (*place, "points"),
            "points is for ranges; listed values are tried in all combinations",
        )
    both = sorted(set(spec.seeds) & set(seeds))
    if both:
        problems.add(
            (*place, "seeds"),
            f"seed {both[0]} is one of the study's seeds, so the choice would be judged by the "
            "runs that made it; give other seeds, e.g. seeds: [1000]",
        )
    if len(set(spec.seeds)) < len(spec.seeds) or wrong_seed(spec.seeds) is not None:
        problems.add((*place, "seeds"), f"seeds are different whole numbers from 0 to {LAST_SEED}")
    if isinstance(file.design, Search):
        problems.add(
            place,
            "a search chooses among all settings by itself: make the nuisance a factor of the "
            "search, or set another design",
        )
    if problems.at(place):
        return (), Candidates()
    return _tuned(file, spec, recipe, resolved, problems)


def _tuned(
    file: StudyFile,
    spec: Nuisance,
    recipe: Recipe,
    resolved: Mapping[str, Any],
    problems: Problems,
) -> tuple[tuple[Factor, ...], Candidates]:
    """The settings of a sound nuisance as factors, and every point to try."""
    candidates: list[dict[str, str]] = []
    levels: dict[str, dict[str, Level]] = {
        name: {name_level(resolved[name]): Level(name_level(resolved[name]), ())}
        for name in spec.settings
    }
    for point in _points(spec, resolved):
        if resolve(recipe, file.baseline, point, problems, ("nuisance", "settings")) is None:
            return (), Candidates()
        names = {name: name_level(value) for name, value in point.items()}
        for name, value in point.items():
            levels[name].setdefault(names[name], Level(names[name], ((name, value),)))
        if names not in candidates:
            candidates.append(names)
    made = tuple(
        Factor(name, tuple(found.values()), name_level(resolved[name]), is_nuisance=True)
        for name, found in levels.items()
    )
    return made, Candidates(tuple(candidates), tuple(spec.seeds))


def _points(spec: Nuisance, resolved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The values of the nuisance settings to try, in order."""
    names = list(spec.settings)
    if spec.points is None:
        lists = [span for span in spec.settings.values() if isinstance(span, list)]
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*lists)]
    if len(names) == 1:
        places = [[i / (spec.points - 1)] for i in range(spec.points)]
    else:
        from scipy.stats import qmc

        places = qmc.Halton(len(names), scramble=True, rng=0).random(spec.points).tolist()
    return [
        {
            name: _value_at(span, share, whole=isinstance(resolved[name], int))
            for (name, span), share in zip(spec.settings.items(), place, strict=True)
        }
        for place in places
    ]


def _value_at(span: list[Any] | Range, share: float, *, whole: bool) -> Any:
    """The value at a share in [0, 1] of a range (three digits are kept) or of a list."""
    if isinstance(span, list):
        return span[min(int(share * len(span)), len(span) - 1)]
    if span.log:
        value = span.low * (span.high / span.low) ** share
    else:
        value = span.low + (span.high - span.low) * share
    return round(value) if whole else float(f"{value:.3g}")


def find_twins(
    factor: Factor, file: StudyFile, recipe: Recipe, factors: Sequence[Factor]
) -> dict[str, tuple[str, Sameness]]:
    """Levels that repeat an earlier one in every setting of the other factors."""
    controls = file.controls.get(factor.name, ())
    ask = find_ability(file.recipe, "same_rules")
    rules = ask() if ask is not None else ()
    read = frozenset[str]().union(*(rule.fields for rule in rules))
    free = fields_of(recipe.Config, Role.FREE)
    others = [
        other.levels
        for other in factors
        if other is not factor and not other.fields.isdisjoint(read)
    ]
    if math.prod(map(len, others)) > _MOST_SETTINGS:
        return {}
    settings = list(itertools.product(*others))

    def experiment(level: Level, setting: Sequence[Level]) -> dict[str, Any] | None:
        fields = {**file.baseline, **dict(level.fields)}
        for other in setting:
            fields.update(other.fields)
        try:
            config: dict[str, Any] = recipe.Config(**fields).model_dump(mode="json")
        except ValidationError:
            return None  # no cell of this setting can be run
        return {name: value for name, value in config.items() if name not in free}

    def sameness(one: Level, two: Level) -> Sameness | None:
        found: dict[str, Sameness] = {}
        for setting in settings:
            pair = experiment(one, setting), experiment(two, setting)
            if pair[0] is None or pair[1] is None:
                continue
            same = same_experiment(pair[0], pair[1], rules=rules, workers=file.gang.workers)
            if same is None:
                return None
            found.setdefault(",".join(same.reasons), same)
        return next(iter(found.values()), None)

    homes: list[Level] = []
    twins: dict[str, tuple[str, Sameness]] = {}
    ordered = sorted(factor.levels, key=lambda level: level.name != factor.baseline)
    for level in ordered:
        if level.name in controls:
            continue
        for home in homes:
            same = sameness(home, level)
            if same is not None:
                twins[level.name] = (home.name, same)
                break
        else:
            homes.append(level)
    return twins


def resolve(
    recipe: Recipe,
    baseline: Mapping[str, Any],
    fields: Mapping[str, Any],
    problems: Problems,
    place: tuple[Any, ...],
) -> dict[str, Any] | None:
    """The configuration of the baseline with these fields; None, with problems noted at `place`."""
    if "seed" in fields:
        problems.add(place, "a level must not set the seed: seeds are replicates")
        return None
    try:
        config = recipe.Config(**{**baseline, **fields})
    except ValidationError as error:
        problems.add_validation(error, place, recipe.Config)
        return None
    resolved: dict[str, Any] = config.model_dump(mode="json")
    for name, given in (fields or baseline).items():
        if fault := _misread(
            given, resolved.get(name), name in fields_of(recipe.Config, Role.PATH)
        ):
            problems.add((*place, name), fault)
    return None if problems.at(place) else resolved


def _misread(given: Any, value: Any, is_path: bool) -> str:
    """What a recipe takes without a word and nobody meant; empty where there is nothing."""
    if isinstance(given, bool) and not isinstance(value, bool):
        return f"input should be a number or a text, not {str(given).lower()}"
    if is_path and isinstance(given, str) and (template := name_template(given)):
        return f"{template} looks like a template that was not filled in"
    return ""
