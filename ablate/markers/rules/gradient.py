"""Markers of gradients and updates: norm, Adam's staleness, update size, dead parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.rule import Rule
from ablate.markers.series import Episode

_NAMED = 20  # names listed in one event; the rest is counted


@dataclass
class GradNormSpike(Rule):
    """A gradient norm far above its running mean, on ``hits`` rows within ``gap`` steps.

    z = (norm - mean) / deviation, both exponential with factor ``keep``, begun with the median
    and its absolute deviation over the first ``begin`` rows (ZClip, arXiv 2504.02507, begins
    with mean and variance: a first step ten times too large would blind it for long, and a
    NaN among them for ever). Values enter as mean + ``clip_sigma`` deviations at most. Where
    grouped norms are measured, the evidence names the groups that grew most over their own
    median (the per-tensor ratio of AdaGC, arXiv 2502.11034).
    """

    name: ClassVar[str] = "grad_norm_spike"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm",)

    keep: float = 0.97
    begin: int = 25
    clip_sigma: float = 2.5
    sigma: float = 6.0
    hits: int = 2
    gap: int = 10
    memory: int = 16
    """Rows of grouped norms kept for comparison."""

    seen: int = field(default=0, init=False)
    early: list[float] = field(default_factory=list, init=False)
    mean: float | None = field(default=None, init=False)
    variance: float = field(default=0.0, init=False)
    clipped: int = field(default=0, init=False)
    """Rows so far on which clipping at ``clip_sigma`` would have acted."""
    episode: Episode = field(default_factory=lambda: Episode(1, 1), init=False)
    detected_at: int = field(default=0, init=False)
    groups: list[Any] = field(default_factory=list, init=False)
    grown: list[Any] = field(default_factory=list, init=False)

    def start(self, context: Context) -> None:
        gap = context.near(self.gap)
        self.episode = Episode(1 if gap <= self.hits else self.hits, gap)

    def update(self, row: Row) -> Iterable[Event]:
        norm = row.finite("grad_norm")
        self.seen += 1
        if norm is None:
            return ()
        found: list[Event] = []
        if self.mean is None:
            self._begin(norm)
        elif self._outlier(row, norm):
            self.detected_at = row.step
            self.grown = self._localise(row)
            found.append(self._tell())
        groups = row.group("grad_norm")
        if groups:
            self.groups = [*self.groups, groups][-self.memory :]
        if self.episode.ended(self.seen):
            found.append(self._tell())
        return found

    def finish(self, step: int) -> Iterable[Event]:
        return [self._tell()] if self.episode.open else ()

    def _begin(self, norm: float) -> None:
        self.early.append(norm)
        if len(self.early) < self.begin:
            return
        self.mean = median(self.early)
        deviation = 1.4826 * median(abs(value - self.mean) for value in self.early)
        self.variance = deviation * deviation
        self.early = []

    def _outlier(self, row: Row, norm: float) -> bool:
        """Take the norm in; true when it opens an episode."""
        assert self.mean is not None
        mean, deviation = self.mean, math.sqrt(self.variance)
        z = (norm - mean) / (deviation + 1e-6)
        if z > self.clip_sigma:
            self.clipped += 1
            norm_in = mean + self.clip_sigma * deviation
        else:
            norm_in = norm
        apart = norm_in - mean
        self.mean = mean + (1.0 - self.keep) * apart
        self.variance = self.keep * (self.variance + (1.0 - self.keep) * apart * apart)
        return z > self.sigma and self.episode.hit(self.seen, row.step, norm, mean, deviation)

    def _localise(self, row: Row) -> list[Any]:
        """The three groups that grew most, as [group, norm over its recent median]."""
        past: dict[str, list[float]] = {}
        for groups in self.groups:
            for part, value in groups:
                past.setdefault(part, []).append(value)
        ratios: list[list[Any]] = [
            [part, value / usual]
            for part, value in row.group("grad_norm")
            if part in past and (usual := median(past[part])) > 0.0
        ]
        return sorted(ratios, key=lambda item: -item[1])[:3]

    def _tell(self) -> Event:
        mean, deviation = self.episode.first[3:5]
        peak = self.episode.peak[2]
        return event(
            self.name,
            kind="spike",
            quantity="grad_norm",
            first_step=self.episode.first_step,
            last_step=self.episode.last_step,
            detected_at=self.detected_at,
            severity="warning",
            flag="GRAD_NORM_SPIKE",
            message=f"gradient norm rose to {peak:.4g} at step {self.episode.peak_step}, "
            f"from {mean:.4g}",
            mean=mean,
            std=deviation,
            peak=peak,
            peak_step=self.episode.peak_step,
            ratio=peak / mean if mean > 0.0 else None,
            hits=self.episode.count,
            clip_rate=self.clipped / self.seen,
            groups=self.grown,
        )


@dataclass
class RmsSpike(Rule):
    """A gradient that Adam's second moment no longer knows: it is too large for its past.

    rms = sqrt(mean(g^2 / max(u, eps^2))) of a tensor, u the de-biased second moment after the
    update; 1 when the gradients are stationary. Loss spikes follow 1 to 8 steps after it
    reaches 2.3 in the input layer (Wortsman et al. 2023). That figure is of large batches: in
    a healthy small model the noise of the gradients alone passes it (2.6 at batch 128). So
    its logarithm must also lie ``sigmas`` deviations above what is usual for the tensor. A
    label only; the loss spike that follows is linked to it.
    """

    name: ClassVar[str] = "rms_spike"
    reads: ClassVar[tuple[str, ...]] = ("rms/",)

    limit: float = 2.3
    sigmas: float = 4.5
    usual_span: int = 128
    begin: int = 25
    """Rows before a tensor is judged."""
    gap: int = 10
    exclude: str = "token_embedding"
    """Tensors with this in their name: sparse rows make the ratio large for good reasons."""

    seen: int = field(default=0, init=False)
    usual: dict[str, list[float]] = field(default_factory=dict, init=False)
    """Tensor -> weight, mean and mean square of its logarithm so far, and rows seen."""
    episodes: dict[str, Any] = field(default_factory=dict, init=False)
    crossings: list[list[Any]] = field(default_factory=list, init=False)
    """Recent [step, tensor] above the limits: what may turn out to predict a loss spike."""

    def start(self, context: Context) -> None:
        self._gap = context.near(self.gap)
        self._span = context.rows(self.usual_span, share=0.1, least=32)

    def update(self, row: Row) -> Iterable[Event]:
        self.seen += 1
        found: list[Event] = []
        for tensor, value in row.group("rms"):
            if self.exclude and self.exclude in tensor:
                continue
            if value <= 0.0:
                continue
            usual = self.usual.setdefault(tensor, [0.0, 0.0, 0.0, 0.0])
            limit = self._limit(usual)
            over = usual[3] >= self.begin and value >= limit
            self._learn(usual, math.log(min(value, limit) if over else value))
            if over or tensor in self.episodes:
                found.extend(self._follow(row.step, tensor, value, limit, over=over))
        return found

    def finish(self, step: int) -> Iterable[Event]:
        return [self._tell(tensor, episode) for tensor, episode in self._open()]

    def predicts(self, step: int, *, within: int = 8) -> tuple[str, int] | None:
        """The tensor that crossed 1 to ``within`` steps before ``step``, and how many steps."""
        for crossed, tensor in self.crossings:
            if 1 <= step - crossed <= within:
                return tensor, step - crossed
        return None

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

    def _open(self) -> list[tuple[str, Episode]]:
        return [(tensor, self._episode(tensor)) for tensor in self.episodes]

    def _episode(self, tensor: str) -> Episode:
        episode = Episode(1, self._gap)
        if tensor in self.episodes:
            episode.load_state(self.episodes[tensor])
        return episode

    def _follow(
        self, step: int, tensor: str, value: float, limit: float, *, over: bool
    ) -> Iterable[Event]:
        episode = self._episode(tensor)
        opened = False
        if over:
            self.crossings = [*self.crossings[-31:], [step, tensor]]
            opened = episode.hit(self.seen, step, value, limit)
        ended = episode.ended(self.seen)
        if ended:
            del self.episodes[tensor]
        else:
            self.episodes[tensor] = episode.state()
        return [self._tell(tensor, episode)] if opened or ended else ()

    def _tell(self, tensor: str, episode: Episode) -> Event:
        peak = episode.peak[2]
        return event(
            self.name,
            kind="spike",
            quantity=f"rms/{tensor}",
            first_step=episode.first_step,
            last_step=episode.last_step,
            detected_at=episode.first_step,
            severity="info",
            flag="RMS_SPIKE",
            message=f"the gradient of {tensor} is {peak:.3g} times what Adam's second moment "
            f"expects (step {episode.peak_step})",
            peak=peak,
            peak_step=episode.peak_step,
            limit=episode.first[3],
            rows=episode.count,
        )


@dataclass
class UpdateRatio(Rule):
    """Updates too large or too small for their weights, or drowned in epsilon.

    ``update_ratio/<group>`` is |update| / |weights|. After the warm-up it should lie between
    ``low`` and ``high``; the lower bound falls with the learning rate's schedule, because a
    decay to zero ends every run in tiny updates. Positional embeddings begin with 0.01 and move
    by 2 % a step in healthy runs. ``eps_share`` is the share of tensors whose
    sqrt(mean second moment) is below 10 epsilon: there Adam is mere momentum. A third of
    them begin so with open_clip's zero-initialised residual branches. ``repeats`` measurements
    in a row count.
    """

    name: ClassVar[str] = "update_ratio"
    reads: ClassVar[tuple[str, ...]] = ("update_ratio/", "eps_share")

    high: float = 5e-2
    low: float = 1e-6
    eps_share: float = 0.5
    repeats: int = 3

    peak_lr: float = field(default=0.0, init=False)
    streaks: dict[str, list[Any]] = field(default_factory=dict, init=False)
    """Group -> [side, measurements in a row, first step]."""

    def start(self, context: Context) -> None:
        self._warmup = context.warmup

    def update(self, row: Row) -> Iterable[Event]:
        lr = row.finite("lr")
        self.peak_lr = max(self.peak_lr, lr or 0.0)
        ratios = row.group("update_ratio")
        share = row.finite("eps_share")
        if (not ratios and share is None) or row.step <= self._warmup:
            return ()
        decay = min(1.0, lr / self.peak_lr) if lr is not None and self.peak_lr > 0.0 else 1.0
        sides: dict[str, list[tuple[str, float, int]]] = {}
        for group, ratio in ratios:
            side = "high" if ratio > self.high else "low" if ratio < self.low * decay else ""
            self._count(sides, row.step, group, ratio, side)
        if share is not None:
            self._count(sides, row.step, "", share, "eps" if share > self.eps_share else "")
        return [self._tell(row.step, side, groups) for side, groups in sides.items()]

    def _count(
        self,
        sides: dict[str, list[tuple[str, float, int]]],
        step: int,
        group: str,
        value: float,
        side: str,
    ) -> None:
        held, length, first = self.streaks.get(group, ["", 0, step])
        if side != held:
            length, first = 0, step
        self.streaks[group] = [side, length + 1, first]
        if side and length + 1 == self.repeats:
            sides.setdefault(side, []).append((group, value, first))

    def _tell(self, step: int, side: str, groups: list[tuple[str, float, int]]) -> Event:
        groups = sorted(groups, key=lambda item: item[1], reverse=side != "low")
        group, value, _ = groups[0]
        if side == "eps":
            quantity, flag = "eps_share", "EPSILON_DOMINATES"
            message = f"{value:.0%} of the tensors have second moments below 10 epsilon"
        else:
            quantity, flag = "update_ratio", f"UPDATES_{'LARGE' if side == 'high' else 'SMALL'}"
            message = f"updates of {group} are {value:.2g} of its weights" + (
                f", and {len(groups) - 1} more groups" if len(groups) > 1 else ""
            )
        return event(
            self.name,
            kind=side,
            quantity=quantity,
            first_step=min(first for _, _, first in groups),
            last_step=step,
            detected_at=step,
            severity="warning",
            flag=flag,
            message=message,
            value=value,
            groups=[name for name, _, _ in groups[:_NAMED]],
            count=len(groups),
        )


@dataclass
class DeadGradient(Rule):
    """Parameters whose gradient has been exactly zero for ``least`` steps.

    ``zero_grad_steps/<parameter>`` counts steps in a row with a zero or missing gradient. The
    first ``grace`` steps are free: open_clip's ResNet begins with zero scales on its residual
    branches, whose weights get their first gradients late.
    """

    name: ClassVar[str] = "dead_gradient"
    reads: ClassVar[tuple[str, ...]] = ("zero_grad_steps/",)

    least: int = 50
    grace: int = 10

    dead: dict[str, int] = field(default_factory=dict, init=False)
    """Parameter -> step at which its gradient vanished."""

    def update(self, row: Row) -> Iterable[Event]:
        fresh: dict[str, int] = {}
        for name, steps in row.group("zero_grad_steps"):
            since = max(row.step - int(steps), self.grace)
            if row.step - since < self.least:
                self.dead.pop(name, None)
            elif name not in self.dead:
                fresh[name] = self.dead[name] = since + 1
        if not fresh:
            return ()
        names = sorted(fresh)
        what = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more parameters"
        return [
            event(
                self.name,
                kind="zero",
                quantity="zero_grad_steps",
                first_step=min(fresh.values()),
                last_step=row.step,
                detected_at=row.step,
                severity="warning",
                flag=f"DEAD_PARAM({_common(names)})",
                message=f"no gradient for {self.least} steps: {what}",
                parameters=names[:_NAMED],
                count=len(names),
            )
        ]


def _common(names: list[str]) -> str:
    """A name, or the module that all names share followed by a star."""
    if len(names) == 1:
        return names[0]
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join([*shared, "*"])
