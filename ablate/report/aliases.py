"""What a fraction of all combinations cannot tell apart, for the report."""

from __future__ import annotations

from ablate.study import Study, design
from ablate.words import are, counted


def _confounded(study: Study) -> dict[str, dict[str, float]]:
    """Effect -> what it cannot be told from, with weights; for fractions only."""
    found = design.fraction(study)
    return {} if found is None else found.aliases()


def alias_table(study: Study) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Effects that are one effect to this design; partly confounded ones are counted."""
    rows = []
    seen: set[frozenset[str]] = set()
    for effect, others in _confounded(study).items():
        whole = sorted(name for name, weight in others.items() if abs(weight) > 1 - 1e-9)
        part = len(others) - len(whole)
        if whole and frozenset((effect, *whole)) not in seen:
            seen.add(frozenset((effect, *whole)))
            rows.append((effect, tuple(whole)))
        if part and " x " not in effect:
            rows.append((effect, (f"partly, {counted(part, 'pair')} of other factors",)))
    return tuple(rows)


def main_aliases(study: Study) -> dict[str, list[str]]:
    """Factor -> effects that are wholly confounded with it."""
    confounded = _confounded(study)
    return {
        factor.name: sorted(n for n, w in confounded[factor.name].items() if abs(w) > 1 - 1e-9)
        for factor in study.factors
        if confounded.get(factor.name)
    }


def partial_aliases(study: Study) -> dict[str, str]:
    """Factor -> in words, the pairs of others that are in its estimate in part."""
    found = {}
    for factor in study.factors:
        mine = [abs(w) for w in _confounded(study).get(factor.name, {}).values()]
        part = [weight for weight in mine if 1e-9 < weight <= 1 - 1e-9]
        if part:
            found[factor.name] = (
                f"made by pairs of other factors: {counted(len(part), 'pair')} {are(len(part))} in "
                f"this estimate with a weight of up to {max(part):.2g}"
            )
    return found
