"""Markers of what the model computes: attention and output logits, temperature, features."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.rule import Rule
from ablate.markers.series import Ema, Streak, Window


@dataclass
class AttentionLogits(Rule):
    """Attention logits that grow without bound, as they do before low-precision divergence
    (Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training
    instabilities")."""

    name: ClassVar[str] = "attention_logits"
    reads: ClassVar[tuple[str, ...]] = ("attention_logits/",)

    warn: float = 50.0
    severe: float = 1e4

    told: dict[str, list[int]] = field(default_factory=dict, init=False)
    """Layer -> [level told, first step]."""

    def update(self, row: Row) -> Iterable[Event]:
        found = []
        for layer, value in row.group("attention_logits"):
            level = 2 if value > self.severe else 1 if value > self.warn else 0
            held, first = self.told.get(layer, [0, row.step])
            if value < self.warn / 2.0:
                self.told.pop(layer, None)
            if level <= held:
                continue
            first = first if held else row.step
            self.told[layer] = [level, first]
            found.append(
                event(
                    self.name,
                    kind="growth",
                    quantity=f"attention_logits/{layer}",
                    first_step=first,
                    last_step=row.step,
                    detected_at=row.step,
                    severity="severe" if level == 2 else "warning",
                    flag="ATTENTION_LOGITS",
                    message=f"attention logits of {layer} reached {value:.3g}",
                    value=value,
                    limit=self.severe if level == 2 else self.warn,
                )
            )
        return found


@dataclass
class LogitDrift(Rule):
    """Output logits that keep growing although the loss does not fall.

    ``logits_lse``, the mean logsumexp over the rows of the logits, grows in every healthy CLIP
    run with the temperature and with the similarity of true pairs. So it is divided by
    ``logit_scale`` where that is measured, and its rise counts only while nothing is learnt:
    on ``hold`` rows in a row its mean over ``fast`` rows is above that over ``slow`` rows by
    more than ``sigmas`` times its noise, and over these rows the slow mean of the loss did
    not fall by a tenth of the loss's noise, nor by ``still`` of itself (a loss that has come
    to rest has next to no noise, and its slow mean creeps on for long). The undivided mean
    must rise too: logits that say nothing have the logarithm of their number, of which a
    falling temperature makes a larger quotient although no logit grows. (Language models
    bound the logsumexp by a penalty, the z-loss of PaLM; CLIP's temperature is clamped, see
    logit_scale.)
    """

    name: ClassVar[str] = "logit_drift"
    reads: ClassVar[tuple[str, ...]] = ("logits_lse", "loss")

    fast: int = 100
    slow: int = 1000
    sigmas: float = 3.0
    hold: int = 1000
    still: float = 1e-3

    lse_fast: Ema = field(default_factory=lambda: Ema(1), init=False)
    lse_slow: Ema = field(default_factory=lambda: Ema(1), init=False)
    loss_slow: Ema = field(default_factory=lambda: Ema(1), init=False)
    whole_fast: Ema = field(default_factory=lambda: Ema(1), init=False)
    """Of the logsumexp as it is, as lse_fast and lse_slow are of that over the temperature."""
    whole_slow: Ema = field(default_factory=lambda: Ema(1), init=False)
    lse_rough: Ema = field(default_factory=lambda: Ema(1), init=False)
    """Mean square of the difference between neighbouring rows, twice the noise's variance."""
    loss_rough: Ema = field(default_factory=lambda: Ema(1), init=False)
    before: list[float] = field(default_factory=list, init=False)
    """The last row's logsumexp (over the temperature) and loss."""
    streak: Streak = field(default_factory=Streak, init=False)
    loss_then: float = field(default=0.0, init=False)
    """Slow mean of the loss at the streak's start."""

    def start(self, context: Context) -> None:
        fast = context.rows(self.fast, share=0.05, least=10)
        slow = context.rows(self.slow, share=0.2, least=50)
        self.lse_fast, self.lse_slow = Ema(fast), Ema(slow)
        self.whole_fast, self.whole_slow = Ema(fast), Ema(slow)
        self.loss_slow = Ema(slow)
        self.lse_rough, self.loss_rough = Ema(slow), Ema(slow)
        self._hold = context.rows(self.hold, share=0.2, least=50)

    def update(self, row: Row) -> Iterable[Event]:
        lse, loss = row.finite("logits_lse"), row.finite("loss")
        if lse is None or loss is None:
            return ()
        grows = self.whole_fast.push(lse) > self.whole_slow.push(lse)
        scale = row.finite("logit_scale")
        if scale is not None and scale > 0.0:
            lse /= scale
        lse_before, loss_before = self.before or (lse, loss)
        self.before = [lse, loss]
        noise = math.sqrt(self.lse_rough.push((lse - lse_before) ** 2) / 2.0)
        loss_noise = math.sqrt(self.loss_rough.push((loss - loss_before) ** 2) / 2.0)
        rise = self.lse_fast.push(lse) - self.lse_slow.push(lse)
        loss_now = self.loss_slow.push(loss)
        length = self.streak.extend(grows and 0.0 < self.sigmas * noise < rise, row.step)
        if length == 1:
            self.loss_then = loss_now
        if length != self._hold:
            return ()
        if self.loss_then - loss_now > max(0.1 * loss_noise, self.still * self.loss_then):
            self.streak.extend(False, row.step)  # it learns: begin anew
            return ()
        return [
            event(
                self.name,
                kind="drift",
                quantity="logits_lse",
                first_step=self.streak.first_step,
                last_step=row.step,
                detected_at=row.step,
                severity="warning",
                flag="LOGIT_DRIFT",
                message=f"output logits grow ({rise:+.2g} to {self.lse_fast.mean:.3g} "
                f"times the temperature) while the loss does not fall",
                rise=rise,
                noise=noise,
                rows=self._hold,
            )
        ]


@dataclass
class LogitScale(Rule):
    """The temperature at its limit, fallen, or jumping.

    ``logit_scale`` is exp of the parameter, which open_clip clamps to [1, 100] after every
    step. At the upper limit for ``saturated_share`` of ``window`` rows, comparisons of
    anything that acts through the temperature mean little. Below ``fallen`` after the warm-up
    the logits can no longer tell pairs apart. A jump of ``jump`` in its logarithm within
    ``jump_steps`` is faster than Adam moves it at common learning rates.
    """

    name: ClassVar[str] = "logit_scale"
    reads: ClassVar[tuple[str, ...]] = ("logit_scale",)

    limit: float = 100.0
    window: int = 500
    saturated_share: float = 0.9
    fallen: float = 3.0
    jump: float = 0.3
    jump_steps: int = 100

    seen: int = field(default=0, init=False)
    at_limit: Window = field(default_factory=lambda: Window(1), init=False)
    past: Window = field(default_factory=lambda: Window(1), init=False)
    """Logarithms of the last ``jump_steps`` steps."""
    saturated: bool = field(default=False, init=False)
    low: bool = field(default=False, init=False)
    jumped_at: int = field(default=-1, init=False)
    """Row of the last jump told: until it has left the window it is not told again."""

    def start(self, context: Context) -> None:
        self.at_limit = Window(context.rows(self.window, share=0.2, least=50))
        self._lookback = context.near(self.jump_steps)
        self.past = Window(self._lookback)
        self._warmup = context.warmup

    def update(self, row: Row) -> Iterable[Event]:
        scale = row.finite("logit_scale")
        self.seen += 1
        if scale is None or scale <= 0.0:
            return ()
        found = []
        log_scale = math.log(scale)
        moved = log_scale - self.past.oldest if self.past.count else 0.0
        self.past.push(log_scale)
        self.at_limit.push(float(scale >= self.limit * math.exp(-1e-3)))
        share = self.at_limit.mean() if self.at_limit.full else 0.0
        if share > self.saturated_share and not self.saturated:
            self.saturated = True
            found.append(
                self._tell(
                    row.step,
                    "saturated",
                    "info",
                    "SATURATED",
                    f"the temperature is at its limit of {self.limit:g}",
                    scale,
                    share=share,
                )
            )
        elif share < self.saturated_share / 2.0:
            self.saturated = False
        if row.step > self._warmup and scale < self.fallen and not self.low:
            self.low = True
            found.append(
                self._tell(
                    row.step,
                    "fallen",
                    "warning",
                    "SCALE_FALLEN",
                    f"the temperature fell to {scale:.3g}: logits are nearly uniform",
                    scale,
                )
            )
        elif scale > 1.5 * self.fallen:
            self.low = False
        if abs(moved) > self.jump:
            if self.jumped_at < 0 or self.seen - self.jumped_at > self._lookback:
                found.append(
                    self._tell(
                        row.step,
                        "jump",
                        "info",
                        "SCALE_JUMP",
                        f"the temperature moved by {moved:+.2f} (log) to {scale:.3g} within "
                        f"{self.jump_steps} steps",
                        scale,
                        moved=moved,
                    )
                )
            self.jumped_at = self.seen
        return found

    def _tell(
        self,
        step: int,
        kind: str,
        severity: Any,
        flag: str,
        message: str,
        scale: float,
        **evidence: Any,
    ) -> Event:
        return event(
            self.name,
            kind=kind,
            quantity="logit_scale",
            first_step=step,
            last_step=step,
            detected_at=step,
            severity=severity,
            flag=flag,
            message=message,
            value=scale,
            **evidence,
        )


@dataclass
class FeatureCollapse(Rule):
    """Features of a tower that all point the same way, or fill only a few dimensions.

    ``<tower>_feature_std`` is the mean over dimensions of the deviation of normalised
    features: 1/sqrt(dim) when they are spread evenly, 0 when collapsed. Below ``std_share`` of
    that on ``hold`` rows, or a ``<tower>_feature_rank`` (effective rank) below ``rank`` or
    ``rank_share`` of its own maximum on ``rank_repeats`` measurements, is COLLAPSED (in a
    narrow embedding ``rank`` is at most a quarter of its width). Features
    of a network at initialisation lie in a narrow cone (Liang et al. 2022, "Mind the gap"), so
    a tower is judged once it has been healthy, or after ``Context.settled``; but no cone is as
    narrow as ``point_share`` of the limit, which counts from the first row on.
    """

    name: ClassVar[str] = "feature_collapse"
    reads: ClassVar[tuple[str, ...]] = (
        "image_feature_std",
        "text_feature_std",
        "image_feature_rank",
        "text_feature_rank",
    )
    needs: ClassVar[tuple[str, ...]] = ("feature_dim",)

    std_share: float = 0.25
    point_share: float = 0.01
    hold: int = 200
    rank: float = 8.0
    rank_share: float = 0.3
    rank_repeats: int = 2

    healthy: dict[str, bool] = field(default_factory=dict, init=False)
    """Quantities that were once at twice their limit."""
    best_rank: dict[str, float] = field(default_factory=dict, init=False)
    streaks: dict[str, list[int]] = field(default_factory=dict, init=False)
    """Quantity -> [measurements in a row, first step]."""
    told: dict[str, Any] = field(default_factory=dict, init=False)
    """Quantity -> its present event."""

    def start(self, context: Context) -> None:
        dim = context.feature_dim
        self._std_limit = self.std_share / math.sqrt(dim) if dim else None
        self._rank_limit = min(self.rank, dim / 4.0) if dim else self.rank
        self._hold = context.hold(self.hold, share=0.2, least=50)
        self._settled = context.settled

    @property
    def present(self) -> bool:
        """A tower is collapsed now."""
        return bool(self.told)

    def update(self, row: Row) -> Iterable[Event]:
        return self._judge(row)

    def evaluate(self, row: Row) -> Iterable[Event]:
        return self._judge(row)

    def _judge(self, row: Row) -> list[Event]:
        found: list[Event] = []
        for tower in ("image", "text"):
            std = row.finite(name := f"{tower}_feature_std")
            if std is not None and self._std_limit is not None:
                bad = self._is_low(row.step, name, std, self._std_limit)
                found.extend(self._count(row.step, name, std, self._std_limit, self._hold, bad))
            rank = row.finite(name := f"{tower}_feature_rank")
            if rank is not None:
                best = self.best_rank[tower] = max(rank, self.best_rank.get(tower, 0.0))
                limit = max(self._rank_limit, self.rank_share * best)
                bad = self._is_low(row.step, name, rank, limit)
                found.extend(self._count(row.step, name, rank, limit, self.rank_repeats, bad))
        return found

    def _is_low(self, step: int, name: str, value: float, limit: float) -> bool:
        """Below the limit, at a time when that may be held against the tower."""
        if value > 2.0 * limit:
            self.healthy[name] = True
        if name.endswith("_std") and value < self.point_share * limit:
            return True
        return value < limit and (self.healthy.get(name, False) or step > self._settled)

    def _count(
        self, step: int, name: str, value: float, limit: float, hold: int, bad: bool
    ) -> Iterable[Event]:
        length, first = self.streaks.get(name, [0, step])
        if not bad:
            self.streaks[name] = [0, step]
            told = self.told.pop(name, None)
            if told is None:
                return ()
            return [
                Event.from_dict(told).revised(
                    last_step=step, verdict="DEGRADED", evidence={"recovered_at": step}
                )
            ]
        first = first if length else step
        self.streaks[name] = [length + 1, first]
        if length + 1 != hold:
            return ()
        tower, _, what = name.split("_")
        told_now = event(
            self.name,
            kind=what,
            quantity=name,
            first_step=first,
            last_step=step,
            detected_at=step,
            verdict="COLLAPSED",
            flag="FEATURE_COLLAPSE",
            message=f"{tower} features collapsed: {name} is {value:.3g}, below {limit:.3g}",
            value=value,
            limit=limit,
            measurements=hold,
        )
        self.told[name] = told_now.to_dict()
        return [told_now]
