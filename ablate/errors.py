"""Every exception that is meant for the user.

AblateError
├── StudyError (ValueError)        the study file: what was given, where, what is allowed
├── PlanError (ValueError)         a valid study that cannot be planned as asked
├── AbilityError (ValueError)      a recipe that cannot do what a verb asks of it
├── RecordError (ValueError)       a run folder that cannot be read, or was written by another study
├── DataError (ValueError)         a data set that is missing, damaged or refused
├── CheckpointError (RuntimeError) no usable checkpoint, or one that does not fit the trial
│   └── SpaceError                 the disk is full; freeing some is all that helps
├── LoadError (ValueError)         weights that do not fit the model
├── InfeasibleError (RuntimeError) a configuration that does not fit this machine
├── AnalysisError (ValueError)     results that cannot be analysed as asked
├── ThresholdError (ValueError)    markers: an unknown marker or threshold (ablate.markers)
├── ForeignError (ValueError)      markers: a run made elsewhere that is unreadable
├── TrackingError (RuntimeError)   the tracking store cannot be used as asked
└── ClusterError (RuntimeError)    Ray or a machine
    └── PlacementError             a gang that can never be placed; names the missing resource

Each message says what was given, what is allowed, and what to do next. They are built from
plain strings, so they survive pickling between processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_READABLE = 20
"""Names that a message lists although it has found the likely one."""


class AblateError(Exception):
    """Base of all errors that the command line prints without a traceback."""


class StudyError(AblateError, ValueError):
    """The study file is wrong; the message starts with ``file:line:``."""


class PlanError(AblateError, ValueError):
    """The study is valid, but cannot be planned as asked."""


class AbilityError(AblateError, ValueError):
    """A recipe lacks the optional function that a verb needs; says which."""


class RecordError(AblateError, ValueError):
    """A run folder cannot be read, or belongs to another study."""


class DataError(AblateError, ValueError):
    """A data set is missing, damaged or refused."""


class CheckpointError(AblateError, RuntimeError):
    """No usable checkpoint, or one that does not fit the trial."""


class SpaceError(CheckpointError):
    """A checkpoint does not fit on the disk; says how much is missing."""


class LoadError(AblateError, ValueError):
    """Weights do not fit the model they are loaded into."""


class InfeasibleError(AblateError, RuntimeError):
    """The configuration does not fit this machine (out of memory); retrying cannot help."""


class AnalysisError(AblateError, ValueError):
    """Results cannot be analysed as asked."""


class TrackingError(AblateError, RuntimeError):
    """The tracking store cannot be used as asked."""


class ClusterError(AblateError, RuntimeError):
    """Ray or a machine failed in a way that retrying the trial cannot mend."""


class PlacementError(ClusterError):
    """A gang that this cluster can never place; the message names the missing resource."""


def suggest(given: str, known: Iterable[str]) -> str:
    """The likely intention behind an unknown name, and what is allowed.

    A list too long to be read is left out where the intention is clear.
    """
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if near and len(names) > _READABLE:
        return f"did you mean {near[0]!r}? ({len(names)} names are allowed)"
    allowed = ", ".join(names)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Allowed: {allowed}"
