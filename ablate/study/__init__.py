"""A study file: YAML in, a validated and frozen `Study` out.

Everything a study can get wrong is said before anything starts, all at once, each with file and
line, what is allowed, and the nearest valid name.
"""

from __future__ import annotations

from ablate.study.file import load_setting, load_study, parse_study
from ablate.study.schema import (
    EARLIEST_RUNG,
    AblationPath,
    FractionalFactorial,
    FullFactorial,
    LeaveOneOut,
    Objective,
    Observed,
    OneAtATime,
    PlackettBurman,
    Prune,
    Search,
    SequentialSeeds,
    json_schema,
)
from ablate.study.study import Factor, Level, Study

__all__ = [
    "EARLIEST_RUNG",
    "AblationPath",
    "Factor",
    "FractionalFactorial",
    "FullFactorial",
    "LeaveOneOut",
    "Level",
    "Objective",
    "Observed",
    "OneAtATime",
    "PlackettBurman",
    "Prune",
    "Search",
    "SequentialSeeds",
    "Study",
    "json_schema",
    "load_setting",
    "load_study",
    "parse_study",
]
