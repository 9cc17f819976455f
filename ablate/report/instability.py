"""Which settings made runs unstable."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median

from ablate.markers.healthy import false_names
from ablate.study.table import StudyTable
from ablate.words import are, counted


@dataclass(frozen=True, slots=True)
class InstabilityRow:
    cell: str
    runs: int
    verdicts: tuple[tuple[str, int], ...]
    """(the markers' verdict on a run, runs), worst first."""
    counts: tuple[str, ...]
    """By marker: "events in runs", or empty."""
    first: str
    """First event of all seeds: its marker and step."""
    flags: str


@dataclass(frozen=True, slots=True)
class Instability:
    markers: tuple[str, ...]
    rows: tuple[InstabilityRow, ...]
    """Cells in which a marker saw something."""
    calm: int
    """Cells in which none did."""
    unjudged: str
    """In how many cells there was nothing to judge by, where there are any; else empty."""
    by_chance: str
    """How often healthy runs of this length are called something, where one is; else empty."""


_VERDICT_ORDER = ("NUMERIC_FAIL", "DIVERGED", "COLLAPSED", "DEGRADED", "SPIKY", "STABLE")


def instability(table: StudyTable) -> Instability:
    """Where training was not calm."""
    markers = sorted({str(event["marker"]) for row in table.rows for event in row.events})
    rows, calm, unjudged = [], 0, 0
    for cell in table.everything:
        ran = [row for row in cell.trials if row.ended]
        events = [(event, row) for row in ran for event in row.events]
        flags = sorted({flag for row in ran for flag in row.flags})
        if not events and not flags and all(row.verdict in ("", "STABLE") for row in ran):
            silent = any(row.scored for row in ran) and not any(row.verdict for row in ran)
            unjudged += silent
            calm += bool(ran) and not silent
            continue
        counts = []
        for marker in markers:
            mine = [row.id for event, row in events if event["marker"] == marker]
            counts.append(f"{len(mine)} in {len(set(mine))}" if mine else "")
        first = min(events, key=lambda item: item[0]["first_step"], default=None)
        tally = Counter(row.verdict for row in ran if row.verdict)
        rows.append(
            InstabilityRow(
                cell=cell.name,
                runs=len(ran),
                verdicts=tuple(sorted(tally.items(), key=lambda item: _severity(item[0]))),
                counts=tuple(counts),
                first=f"step {first[0]['first_step']}, seed {first[1].seed}" if first else "",
                flags=", ".join(flags),
            )
        )
    said = f"No run of {counted(unjudged, 'cell')} told a loss by which it could be judged."
    return Instability(
        tuple(markers), tuple(rows), calm, said if unjudged else "", _by_chance(table)
    )


def _by_chance(table: StudyTable) -> str:
    lengths = [row.step for row in table.rows if row.verdict not in ("", "STABLE") and row.step]
    if not lengths:
        return ""
    found = false_names(round(median(lengths)))
    return (
        f"By chance: of {found.runs} simulated healthy runs of {found.steps:,} steps, the length "
        f"nearest to these runs' that was measured, {found.named} {are(found.named)} called SPIKY "
        "or DEGRADED, and none anything else."
    )


def _severity(name: str) -> int:
    return _VERDICT_ORDER.index(name) if name in _VERDICT_ORDER else len(_VERDICT_ORDER)
