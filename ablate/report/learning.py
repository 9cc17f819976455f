"""Whether the runs of a study learnt anything, by each trial's own proof."""

from __future__ import annotations

from ablate.analysis.results import tabulate
from ablate.analysis.settle import at_chance
from ablate.report.scale import objective_of
from ablate.study.table import StudyTable
from ablate.words import counted


def nothing_learnt(table: StudyTable) -> str:
    """A reason, when no trial that was looked at has learnt; empty when one has, or none was.

    The proof compares last with first weights on labelled images (``ablate inspect``); what it
    leaves undecided is no evidence. Nor is anything it says against an objective that is clearly
    beyond guessing and either measures learning itself, from a zero that its metric declares
    (``recon_gap``), or is of runs that began with given weights, in which it was learnt before.
    """
    declared = table.study.describe(table.study.objective.metric)
    measures_learning = declared is not None and declared.chance is not None
    words = [row.learning for row in table.rows if row.value is not None]
    if measures_learning or "nothing added" in words:
        results = [row.result(c.levels) for c in table.cells for row in c.trials if row.ended]
        if results and not at_chance(tabulate(results), objective_of(table)):
            return ""
    told = [word for word in words if word not in ("undecided", "")]
    if not told or "learning" in told:
        return ""
    return f"of {counted(len(told), 'run')} whose weights were looked at none has learnt anything"
