"""The marker of gradients that Adam's second moment does not know."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker


@dataclass
class RmsSpike(Marker):
    """A gradient that Adam's second moment no longer knows: it is too large for its past.

    rms = sqrt(mean(g^2 / max(u, eps^2))) of a tensor, u the de-biased second moment after the
    update; 1 when the gradients are stationary. Loss spikes follow 1 to 8 steps after it
    reaches 2.3 in the input layer (Wortsman et al. 2023). That figure is of large batches: in
    a healthy small model the noise of the gradients alone passes it (2.6 at batch 128). So
    its logarithm must also lie ``sigmas`` deviations above what is usual for the tensor.

    Healthy long runs cross it by the dozen: crossings are counted, a tensor's first is noted,
    and only those are flagged that a loss spike which names the run follows within ``lead``
    steps; the spike's event then says so, as ``predicted_by``.
    """

    name: ClassVar[str] = "rms_spike"
    reads: ClassVar[tuple[str, ...]] = ("rms/",)

    limit: float = 2.3
    sigmas: float = 4.5
    usual_span: int = 128
    begin: int = 25
    """Rows before a tensor is judged."""
    lead: int = 8
    exclude: str = "token_embedding"
    """Tensors with this in their name: sparse rows make the ratio large for good reasons."""

    usual: dict[str, list[float]] = field(default_factory=dict, init=False)
    """Tensor -> weight, mean and mean square of its logarithm so far, and rows seen."""
    crossings: list[list[Any]] = field(default_factory=list, init=False)
    """Recent [step, tensor] above the limits: what may turn out to predict a loss spike."""
    counted: dict[str, list[float]] = field(default_factory=dict, init=False)
    """Tensor -> first and last step, peak, its step, limit of the first, and rows."""
    links: dict[str, Any] = field(default_factory=dict, init=False)
    """First step of a loss spike -> what announced it."""

    def start(self, context: Context) -> None:
        self._span = context.rows(self.usual_span, share=0.1, least=32)

    def update(self, row: Row) -> Iterable[Event]:
        found: list[Event] = []
        for tensor, value in row.group("rms"):
            if (self.exclude and self.exclude in tensor) or value <= 0.0:
                continue
            usual = self.usual.setdefault(tensor, [0.0, 0.0, 0.0, 0.0])
            limit = self._limit(usual)
            over = usual[3] >= self.begin and value >= limit
            self._learn(usual, math.log(min(value, limit) if over else value))
            if over:
                found.extend(self._count(row.step, tensor, value, limit))
        return found

    def hear(self, told: Sequence[Event], row: Row) -> Iterable[Event]:
        """Name the tensor that announced a loss spike, in the spike's event and in its own."""
        found: list[Event] = []
        for item in told:
            if item.marker != "loss_spike" or item.verdict == "STABLE":
                continue
            key = str(item.first_step)
            if key not in self.links:
                self.links[key] = self._predicts(item.first_step)
                if link := self.links[key]:
                    found.append(self._announced(item.first_step, link))
            if link := self.links[key]:
                found.append(item.revised(evidence={"predicted_by": link}))
        return found

    def finish(self, step: int) -> Iterable[Event]:
        return [self._tell(tensor) for tensor, seen in self.counted.items() if seen[5] > 1]

    def _predicts(self, step: int) -> dict[str, Any] | None:
        """The tensor that crossed 1 to ``lead`` steps before ``step``, and how many steps."""
        for crossed, tensor in self.crossings:
            if 1 <= step - crossed <= self.lead:
                return {"tensor": tensor, "steps_before": step - crossed}
        return None

    def _count(self, step: int, tensor: str, value: float, limit: float) -> Iterable[Event]:
        """The first crossing of a tensor is told at once, the number of them at the end."""
        self.crossings = [*self.crossings[-31:], [step, tensor]]
        if tensor not in self.counted:
            self.counted[tensor] = [step, step, value, step, limit, 1]
            return [self._tell(tensor)]
        first, _, peak, peak_step, first_limit, rows = self.counted[tensor]
        highest = max((peak, peak_step), (value, step))
        self.counted[tensor] = [first, step, *highest, first_limit, rows + 1]
        return ()

    def _limit(self, usual: list[float]) -> float:
        weight, mean, square, _ = usual
        if weight == 0.0:
            return self.limit
        mean, square = mean / weight, square / weight
        deviation = math.sqrt(max(square - mean * mean, 0.0))
        return max(self.limit, math.exp(mean + self.sigmas * deviation))

    def _learn(self, usual: list[float], value: float) -> None:
        fresh = 2.0 / (self._span + 1.0)
        for place, seen in enumerate((1.0, value, value * value)):
            usual[place] += fresh * (seen - usual[place])
        usual[3] += 1.0

    def _tell(self, tensor: str) -> Event:
        first, last, peak, peak_step, limit, rows = self.counted[tensor]
        flagged = any(
            link and link["tensor"] == tensor and int(spike) - link["steps_before"] == first
            for spike, link in self.links.items()
        )
        return event(
            self.name,
            kind="spike",
            quantity=f"rms/{tensor}",
            first_step=int(first),
            last_step=int(last),
            detected_at=int(first),
            severity="info",
            flag="RMS_SPIKE" if flagged else "",
            message=f"the gradient of {tensor} is {peak:.3g} times what Adam's second moment "
            f"expects (step {peak_step:.0f})",
            peak=peak,
            peak_step=int(peak_step),
            limit=limit,
            rows=int(rows),
        )

    def _announced(self, spike: int, link: dict[str, Any]) -> Event:
        """The crossing that a loss spike followed."""
        tensor, step = link["tensor"], spike - link["steps_before"]
        if step == self.counted[tensor][0]:
            return self._tell(tensor)
        return event(
            self.name,
            kind="spike",
            quantity=f"rms/{tensor}",
            first_step=step,
            last_step=step,
            detected_at=step,
            severity="info",
            flag="RMS_SPIKE",
            message=f"the gradient of {tensor} outgrew what Adam's second moment expects, and "
            f"the loss spiked at step {spike}",
        )
