"""From what the markers saw to what probably caused it, and which factor to vary next.

Causes are ranked by score; evidence is quoted for each. This is a list of suspects for a person,
not a proof: the proof is an ablation of the factor it names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ablate.markers.causes import CAUSES
from ablate.markers.clue import Cause, Facts, Suspect
from ablate.markers.event import Event

_LEAST = 0.3  # a cause with a lower score is not worth a line


def diagnose(
    events: Iterable[Event | Mapping[str, Any]],
    *,
    config: Mapping[str, Any] | None = None,
    silent: Iterable[str] = (),
    causes: Sequence[Cause] = CAUSES,
    asked: Iterable[str] = (),
) -> list[Suspect]:
    """Likely causes of a run's events, most likely first; empty when nothing points anywhere.

    Only a run that its events name is accused: annotations are what healthy runs have, too.
    ``asked`` are flags (``ATTENTION_LOGITS``) that someone wants explained all the same.
    ``config`` is the resolved configuration (trial.json): without it, clues about precision,
    beta2 and the like are mute. ``silent`` names markers that had no input, whose silence is
    then no argument.
    """
    read = [item if isinstance(item, Event) else Event.from_dict(item) for item in events]
    wanted = set(asked)
    if not any(item.verdict != "STABLE" or item.flag in wanted for item in read):
        return []
    ordered = sorted(read, key=lambda item: item.first_step)
    facts = Facts(ordered, config or {}, frozenset(silent))
    suspects = []
    for cause in causes:
        heard = [(clue.weight, text) for clue in cause.clues if (text := clue.ask(facts))]
        if not heard:
            continue
        score = 1.0 - math.prod(1.0 - weight for weight, _ in heard)
        score *= math.prod(1.0 - clue.weight for clue in cause.against if clue.ask(facts))
        if score >= _LEAST:
            evidence = tuple(text for _, text in sorted(heard, key=lambda pair: -pair[0]))
            suspects.append(
                Suspect(cause.name, round(score, 3), evidence, cause.factors, cause.source)
            )
    return sorted(suspects, key=lambda suspect: -suspect.score)
