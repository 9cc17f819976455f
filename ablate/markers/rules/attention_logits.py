"""The marker of attention logits that grow without bound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ablate.markers.event import Event, Row, event
from ablate.markers.marker import Marker


@dataclass
class AttentionLogits(Marker):
    """Attention logits that grow without bound, as they do before low-precision divergence
    (Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training
    instabilities").

    Told above ``warn`` where they have doubled within ``memory`` measurements, and above
    ``severe`` in any case. Logits that rest are no alarm: a healthy ResNet had 80 in its attention
    pool, and QK-Clip holds those of a model of 10^12 parameters at 100 (Kimi K2, 2025).
    """

    name: ClassVar[str] = "attention_logits"
    reads: ClassVar[tuple[str, ...]] = ("attention_logits/",)

    warn: float = 100.0
    growth: float = 2.0
    memory: int = 10
    severe: float = 1000.0

    past: dict[str, list[float]] = field(default_factory=dict, init=False)
    """Layer -> its last measurements."""
    told: dict[str, list[int]] = field(default_factory=dict, init=False)
    """Layer -> level told, first step, and the step at which it was first told."""

    def update(self, row: Row) -> Iterable[Event]:
        found = []
        for layer, value in row.group("attention_logits"):
            past = self.past.get(layer, [])
            self.past[layer] = [*past, value][-self.memory :]
            grows = bool(past) and value > self.growth * min(past)
            level = 2 if value > self.severe else 1 if value > self.warn and grows else 0
            held, first, at = self.told.get(layer, [0, row.step, row.step])
            if value < self.warn / 2.0:
                self.told.pop(layer, None)
            if level <= held:
                continue
            if not held:
                first = at = row.step
            self.told[layer] = [level, first, at]
            found.append(
                event(
                    self.name,
                    kind="growth",
                    quantity=f"attention_logits/{layer}",
                    first_step=first,
                    last_step=row.step,
                    detected_at=at,
                    severity="severe" if level == 2 else "warning",
                    flag="ATTENTION_LOGITS",
                    message=f"attention logits of {layer} reached {value:.3g}",
                    value=value,
                    limit=self.severe if level == 2 else self.warn,
                )
            )
        return found
