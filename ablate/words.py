"""Words that follow a number or a list, where people read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape


def counted(number: int, noun: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def money(amount: float) -> str:
    """An amount without its unit, which only the user knows: ``0.43``, ``12.50``, ``1,200``."""
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.2f}"


def percent(share: float) -> str:
    """A share in whole per cent: ``24 %``."""
    return f"{100 * share:.0f} %"


def are(number: int) -> str:
    """The verb that follows so many."""
    return "is" if number == 1 else "are"


def name_seeds(seeds: Sequence[int]) -> str:
    """``seed 0``, ``seeds 0, 1``."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def name_levels(levels: Mapping[str, str]) -> str:
    """``beta2=0.98, warmup=1``; a level that would read as several stands in quotes."""
    return ", ".join(
        f"{factor}={level!r}" if re.search(r", [^,]*=", level) else f"{factor}={level}"
        for factor, level in levels.items()
    )


def describe_interruptions(cost: Mapping[str, float]) -> str:
    """Such as: ``2 preemptions, 1 lost machine: 12 steps trained again (0.3 h of workers).``

    `cost` as :func:`ablate.records.folder.interrupted` gives it; nothing where nothing befell.
    """
    kinds = (("preempted", "preemption"), ("lost", "lost machine"))
    told = ", ".join(counted(int(cost[kind]), name) for kind, name in kinds if cost.get(kind))
    if not told:
        return ""
    again = int(cost.get("again", 0))
    if not again:
        return f"{told}: no step was trained again."
    spent_h = cost["again_worker_s"] / 3600
    return f"{told}: {counted(again, 'step')} trained again ({spent_h:.2g} h of workers)."


def html_table(rows: Iterable[Sequence[object]], *, header: Sequence[str] = ()) -> str:
    """Rows as HTML, for notebooks; what stands in them is text."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    head = line(header, "th") if header else ""
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"
