"""What an attempt's end means, and what follows: pure rules, no clock and no files.

A crash says nothing about the setting: the trial is tried again from its last checkpoint. Attempts
that got further than all before them do not count; a trial that keeps dying without progress is
given up, and the study goes on. The word of one machine is not enough while there are others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ablate.cluster.contract import GangEvent
from ablate.runner.suspects import culprit
from ablate.trial.identity import EXIT_NO_SPACE, EXIT_STOPPED, ORDERLY, Outcome

Kind = Literal["ended", "stopped", "preempted", "no_space", "lost", "crashed", "abandoned"]
"""How an attempt ended, in end.json. ended: its last word is on disk; preempted: SIGTERM by someone
else, the machine is wanted back; abandoned: nobody saw it, its controller had been killed."""

FRUITLESS: frozenset[str] = frozenset({"crashed", "lost"})
"""Ends that count against a trial when they brought it no further."""


@dataclass(frozen=True, slots=True)
class RetryRules:
    """When a trial is given up, and how long it waits before it is tried again."""

    attempts: int
    """In a row without progress, of which at least one crashed (``budget.attempts``)."""
    lost: int = 20
    """In a row without progress, that all vanished with their machine."""
    alike: int = 5
    """Of these in a row, lost before their first step and in the same words: a cause that stays,
    e.g. a package that a machine lacks."""
    same_error: int = 2
    """In a row without progress, by the same error at the same place of the code and the same
    step: the trial would raise it again on any machine."""
    longest_pause_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again, not before so many seconds from now."""

    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The trial ends without saying anything about its setting."""

    outcome: Outcome
    reason: str


def kind_of(event: GangEvent, last_word: Mapping[str, Any] | None) -> Kind:
    """How an attempt ended, from the cluster's last event and its own result.json."""
    if last_word is not None and last_word["status"] != "stopped":
        return "ended"  # whatever its processes died of afterwards
    if event.stopped:
        return "stopped"
    if EXIT_STOPPED in event.exit_codes and ORDERLY.issuperset(event.exit_codes):
        return "preempted"
    if EXIT_NO_SPACE in event.exit_codes:
        return "no_space"
    return "lost" if event.kind == "lost" else "crashed"


def decide(
    ends: Sequence[Mapping[str, Any]], *, rules: RetryRules, num_machines: int
) -> Retry | GiveUp:
    """What follows the last of a trial's `ends` (end.json, oldest first), which gave no result.

    `num_machines`: how many held a rank of the study, or could.
    """
    last = ends[-1]["kind"]
    if last in ("stopped", "no_space"):
        return Retry()
    if last == "preempted":
        vain = _preempted_in_vain(ends)
        return Retry(min(2.0**vain, rules.longest_pause_s) if vain else 0.0)
    if (said := _same_error(ends, rules=rules, num_machines=num_machines)) is not None:
        return GiveUp(Outcome.FAILED, said)
    kinds = _fruitless(ends)
    only_lost = set(kinds) == {"lost"}
    if len(kinds) < _limit(ends, only_lost=only_lost, rules=rules, num_machines=num_machines):
        return Retry(min(2.0 ** (len(kinds) - 1), rules.longest_pause_s) - 1.0)
    broken = "" if any(end["step"] > 0 for end in ends) else "broken: no attempt finished a step. "
    return GiveUp(
        Outcome.LOST if only_lost else Outcome.FAILED,
        f"{broken}{len(kinds)} attempts without progress; the last: {ends[-1]['detail']}",
    )


def _preempted_in_vain(ends: Sequence[Mapping[str, Any]]) -> int:
    """How many attempts in a row somebody ended before they took a step: a machine that is being
    drained, or a site's script that ends every job."""
    count = 0
    for end in reversed(ends):
        if end["kind"] != "preempted" or end["step"]:
            break
        count += 1
    return count


def _same_error(
    ends: Sequence[Mapping[str, Any]], *, rules: RetryRules, num_machines: int
) -> str | None:
    """What the last attempts all died of, if it was one error of the code; None otherwise.

    While there are several machines, two of them must have said it.
    """
    last = ends[-rules.same_error :]
    errors = [(end.get("error"), end["step"]) for end in last]
    error, step = errors[-1]
    if len(last) < rules.same_error or error is None or any(each != errors[0] for each in errors):
        return None
    nodes = {node for end in last for node in end.get("nodes") or ()}
    if num_machines > 1 and len(nodes) == 1:
        return None
    where = f"step {step + 1}" if step else "its start, before the first step"
    return (
        f"the same error at the same place in {len(last)} attempts, at {where}, so another try "
        f"would end alike: {error['text']} ({error['place']})"
    )


def _fruitless(ends: Sequence[Mapping[str, Any]]) -> list[str]:
    """Kinds of the crashes and losses since the trial last got further than ever before."""
    kinds: list[str] = []
    best = 0
    for end in ends:
        if end["step"] > best:
            best = end["step"]
            kinds = []
        if end["kind"] in FRUITLESS:
            kinds.append(end["kind"])
    return kinds


def _limit(
    ends: Sequence[Mapping[str, Any]], *, only_lost: bool, rules: RetryRules, num_machines: int
) -> int:
    culprits = {culprit(end) for end in ends}
    if len(culprits) == 1 and None not in culprits and num_machines > 1:
        return rules.lost
    if not only_lost:
        return rules.attempts
    words = [end["detail"] for end in ends[-rules.alike :] if not end["step"]]
    stays = len(words) == rules.alike and len(set(words)) == 1
    return rules.alike if stays else rules.lost


_KEPT = (
    *("best", "final", "verdict", "flags", "stop", "reason", "step"),
    *("train_s", "num_parameters", "parameter_groups", "peak_memory_gib"),
)


def outcome_of(last_word: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """What outcome.json says of an attempt's own last word; `metric` is the study's objective."""
    outcome = Outcome(last_word["status"])
    final = last_word.get("final") or {}
    value = final.get(metric)
    kept = {key: last_word[key] for key in _KEPT if key in last_word}
    if outcome is Outcome.COMPLETED and value is None:
        outcome = Outcome.FAILED
        measured = ", ".join(sorted(final)) or "nothing"
        kept["reason"] = f"the trial ended without {metric}; it measured: {measured}"
    return {
        "outcome": outcome,
        "value": float(value) if outcome is Outcome.COMPLETED and value is not None else None,
        **kept,
    }
