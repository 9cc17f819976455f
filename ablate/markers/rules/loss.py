"""Markers of the loss: spikes, their rate, and divergence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.rule import Rule
from ablate.markers.series import Ema, Episode, Streak, Window


@dataclass
class LossSpike(Rule):
    """A loss far above its recent mean, more than once within a few steps.

    A row hits when loss > mean + ``sigma`` * deviation of the last ``window`` rows; ``hits``
    within ``gap`` steps make a spike (Wortsman et al. 2023, "Stable and low-precision training
    for large-scale vision-language models"). It has recovered when a mean over ``smooth`` rows
    since its end is within one deviation of where it came from, ``recover`` rows after its
    start at most; a spike that has not makes the run DEGRADED.

    A hit enters the window as mean + ``winsor`` * deviation at most, so that a spike neither
    hides the next one nor stays unlearnt for ever. Winsorising already at ``sigma`` would
    shrink the deviation of a heavy-tailed loss: its false alarms rise from 1.8 to 2.2 per
    10 000 steps (Student t with 4 degrees of freedom). The shorter window of a short run takes
    hits in lower, so that one raises the deviation no more than in the full window: in 32 rows
    a hit of 6 deviations would raise it by half, and hide the second hit of a real spike.
    """

    name: ClassVar[str] = "loss_spike"
    reads: ClassVar[tuple[str, ...]] = ("loss",)

    window: int = 128
    sigma: float = 3.2
    hits: int = 2
    gap: int = 10
    winsor: float = 6.0
    sparse_sigma: float = 6.0
    """Where rows lie so far apart that a spike shows in only one, one hit of this size counts."""
    ignore_first: int = 1000
    """The warm-up is not judged, but no more than this many steps or a fifth of the run."""
    recover: int = 500
    smooth: int = 50

    seen: int = field(default=0, init=False)
    history: Window = field(default_factory=lambda: Window(1), init=False)
    episode: Episode = field(default_factory=lambda: Episode(1, 1), init=False)
    undecided: list[dict[str, Any]] = field(default_factory=list, init=False)
    """Spikes of which it is not known yet whether they recover; the open one is the last."""

    def start(self, context: Context) -> None:
        size = context.rows(self.window, share=0.1, least=32)
        self.history = Window(size)
        self._winsor = max(self.sigma, self.winsor * (size / self.window) ** 0.5)
        gap = context.near(self.gap)
        sparse = gap <= self.hits
        self.episode = Episode(1 if sparse else self.hits, gap)
        self._sigma = max(self.sigma, self.sparse_sigma) if sparse else self.sigma
        self._recover = context.rows(self.recover, share=0.2, least=50)
        self._smooth = context.rows(self.smooth, share=0.1, least=10)
        first = min(self.ignore_first, context.warmup)
        total = context.steps_total
        self._first_step = first if total is None else min(first, total // 5)

    def update(self, row: Row) -> Iterable[Event]:
        loss = row.finite("loss")
        self.seen += 1
        if loss is None:
            return ()
        mean, std = self.history.mean_std()
        judged = self.history.full and row.step >= self._first_step and std > 0.0
        hit = judged and loss > mean + self._sigma * std
        self.history.push(min(loss, mean + self._winsor * std) if hit else loss)
        if not hit and not self.undecided:
            return ()
        found: list[Event] = []
        if hit and self.episode.hit(self.seen, row.step, loss, mean, std):
            self._open(row.step)
            found.append(self._tell(self.undecided[-1]))
        if self.episode.ended(self.seen):
            found.append(self._close())
        found.extend(self._decide(loss))
        return found

    def finish(self, step: int) -> Iterable[Event]:
        return [self._close()] if self.episode.open else ()

    def _open(self, step: int) -> None:
        mean, std = self.episode.first[3:5]
        spike = {
            "first_step": self.episode.first_step,
            "detected_at": step,
            "mean": mean,
            "std": std,
            "deadline": self.seen + self._recover,
            "recovered": None,
            "rows_after": 0,
            "after": [0.0, 0.0],
        }
        self.undecided.append(spike | self._extent())

    def _close(self) -> Event:
        self.undecided[-1].update(self._extent())
        return self._tell(self.undecided[-1])

    def _extent(self) -> dict[str, Any]:
        """What of a spike still changes while its episode lasts."""
        return {
            "last_step": self.episode.last_step,
            "peak": self.episode.peak[2],
            "peak_step": self.episode.peak_step,
            "hits": self.episode.count,
        }

    def _decide(self, loss: float) -> Iterable[Event]:
        """Follow spikes that are not known to have recovered, and tell those that are decided."""
        for spike in list(self.undecided):
            if not (self.episode.open and spike is self.undecided[-1]):
                if spike["recovered"] is False:
                    self.undecided.remove(spike)
                    continue
                after = Ema(self._smooth)
                after.load_state(spike["after"])
                back = after.push(loss) <= spike["mean"] + spike["std"]
                spike["after"] = after.state()
                spike["rows_after"] += 1
                if back and spike["rows_after"] >= max(1, self._smooth // 2):
                    spike["recovered"] = True
                    self.undecided.remove(spike)
                    yield self._tell(spike)
                    continue
            if self.seen >= spike["deadline"] and spike["recovered"] is None:
                spike["recovered"] = False
                yield self._tell(spike)

    def _tell(self, spike: dict[str, Any]) -> Event:
        mean, std, peak = spike["mean"], spike["std"], spike["peak"]
        sigmas = (peak - mean) / std
        lost = spike["recovered"] is False
        return event(
            self.name,
            kind="spike",
            quantity="loss",
            first_step=spike["first_step"],
            last_step=spike["last_step"],
            detected_at=spike["detected_at"],
            verdict="DEGRADED" if lost else "SPIKY",
            flag="UNRECOVERED_SPIKE" if lost else "LOSS_SPIKE",
            message=f"loss spiked to {peak:.4g} at step {spike['peak_step']}, {sigmas:.3g} "
            f"deviations above its mean of {mean:.4g}" + (", and did not recover" if lost else ""),
            sigmas=sigmas,
            **{key: spike[key] for key in ("mean", "std", "peak", "peak_step", "hits")},
            recovered=spike["recovered"],
        )


@dataclass
class SpikeScore(Rule):
    """The share of recent steps on which the loss or the gradient norm is an outlier.

    An outlier lies more than ``sigma`` deviations above the mean of the last ``window`` rows;
    the share is taken over ``horizon`` rows (OLMo-core, train/callbacks/stability_monitor.py,
    which loses its sight for a whole window after one NaN; here NaN is never taken in).

    A share is told from ``least_outliers`` on, over ``least_rows`` rows at least, and the
    window never shrinks with the run, so runs shorter than it have none. Two outliers are no
    rate: 2 % of healthy runs of 276 rows have them in a window of 32 (loss and norm with
    Student t noise, 4 degrees of freedom), 12 % of 552 rows; four in the full window have
    none of 300.
    """

    name: ClassVar[str] = "spike_score"
    reads: ClassVar[tuple[str, ...]] = ("loss", "grad_norm")

    window: int = 128
    sigma: float = 6.0
    horizon: int = 10_000
    least_rows: int = 1000
    least_outliers: int = 4
    warn: float = 0.001
    spiky: float = 0.01

    seen: int = field(default=0, init=False)
    loss: Window = field(default_factory=lambda: Window(1), init=False)
    grad_norm: Window = field(default_factory=lambda: Window(1), init=False)
    outliers: list[int] = field(default_factory=list, init=False)
    """Row numbers of outliers within the horizon."""
    since: int = field(default=0, init=False)
    """First step of the present excursion of the score; 0 while there is none."""
    told: int = field(default=0, init=False)
    """0, 1 (warned) or 2 (spiky): the worst that the excursion was told as."""

    def start(self, context: Context) -> None:
        self.loss, self.grad_norm = Window(self.window), Window(self.window)

    def update(self, row: Row) -> Iterable[Event]:
        self.seen += 1
        out = False
        for window, name in ((self.loss, "loss"), (self.grad_norm, "grad_norm")):
            value = row.finite(name)
            if value is None:
                continue
            mean, std = window.mean_std()
            above = window.full and std > 0.0 and value > mean + self.sigma * std
            window.push(mean + self.sigma * std if above else value)
            out = out or above
        if out:
            self.outliers.append(self.seen)
        while self.outliers and self.outliers[0] <= self.seen - self.horizon:
            self.outliers.pop(0)
        if not self.outliers and not self.told:
            return ()
        return self._judge(row.step)

    def _judge(self, step: int) -> Iterable[Event]:
        rows = min(self.horizon, max(self.seen, self.least_rows))
        score = len(self.outliers) / rows
        level = 2 if score > self.spiky else 1 if score > self.warn else 0
        if len(self.outliers) < self.least_outliers:
            level = 0
        if score < self.warn / 2:
            self.told, self.since = 0, 0
        if level <= self.told:
            return ()
        self.told = level
        self.since = self.since or step
        return [
            event(
                self.name,
                kind="rate",
                quantity="loss, grad_norm",
                first_step=self.since,
                last_step=step,
                detected_at=step,
                verdict="SPIKY" if level == 2 else "STABLE",
                severity="warning",
                flag="SPIKE_SCORE",
                message=f"{score:.2%} of {rows} steps have an outlier of the loss or the "
                f"gradient norm",
                score=score,
                outliers=len(self.outliers),
                rows=rows,
            )
        ]


@dataclass
class Divergence(Rule):
    """A run that is lost: its loss went up and stayed, or says nothing any more.

    ``rise``: the smoothed loss stays above its lowest value so far by more than
    max(``rise`` nat, ``rise_sigmas`` * noise) for ``hold`` rows. Noise is the deviation of
    successive differences (over root 2) at the time of that lowest value: in a steep descent
    the deviation of a window would be mostly the descent, and hide a rise of several nat.

    ``chance``: the smoothed loss stays within ``chance_band`` of ln(global batch), which is
    the loss of uniform logits, for ``chance_hold`` rows after ``Context.settled``, and does
    not fall from their first half to their second by more than noise explains. Holding
    matters: every healthy run crosses that value once, on its way down.

    A second, faster mean must agree each time, so that rows after a recovery do not count.
    Means and holds shrink in short runs. ``overshoot`` is a label only: in the first rows,
    before any window is filled, the loss climbs ``overshoot`` nat above where it began.
    """

    name: ClassVar[str] = "divergence"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    needs: ClassVar[tuple[str, ...]] = ("global_batch",)

    smooth: int = 100
    rise: float = 0.5
    rise_sigmas: float = 5.0
    hold: int = 500
    chance_band: float = 0.05
    chance_hold: int = 500
    overshoot: float = 0.5
    stop: bool = True

    seen: int = field(default=0, init=False)
    slow: Ema = field(default_factory=lambda: Ema(1), init=False)
    fast: Ema = field(default_factory=lambda: Ema(1), init=False)
    roughness: Ema = field(default_factory=lambda: Ema(1), init=False)
    """Mean square of the difference between neighbouring rows."""
    before: float | None = field(default=None, init=False)
    first: float | None = field(default=None, init=False)
    best: float | None = field(default=None, init=False)
    """Lowest value of the slow mean."""
    best_step: int = field(default=0, init=False)
    best_noise: float = field(default=0.0, init=False)
    risen: Streak = field(default_factory=Streak, init=False)
    at_chance: Streak = field(default_factory=Streak, init=False)
    halves: list[float] = field(default_factory=lambda: [0.0, 0.0], init=False)
    """Sums of the loss over the first and second half of ``at_chance``."""
    told_chance: bool = field(default=False, init=False)
    first_norm: float | None = field(default=None, init=False)
    early: Episode = field(default_factory=lambda: Episode(2, 10), init=False)

    def start(self, context: Context) -> None:
        span = context.rows(self.smooth, share=0.1, least=20)
        self.slow, self.fast = Ema(span), Ema(max(3, span // 5))
        self.roughness = Ema(span)
        self._hold = context.hold(self.hold, share=0.2, least=50)
        self._chance_hold = context.hold(self.chance_hold, share=0.2, least=50)
        self._chance = context.chance_loss
        self._settled = context.settled
        self._early_rows = context.rows(128, share=0.1, least=32)

    def update(self, row: Row) -> Iterable[Event]:
        loss = row.finite("loss")
        self.seen += 1
        if loss is None:
            return ()
        slow, fast = self.slow.push(loss), self.fast.push(loss)
        apart = 0.0 if self.before is None else loss - self.before
        self.before = loss
        noise = (self.roughness.push(apart * apart) / 2.0) ** 0.5
        if self.first is None:
            self.first, self.first_norm = loss, row.finite("grad_norm")
        if self.best is None or slow < self.best:
            self.best, self.best_step, self.best_noise = slow, row.step, noise
        return [
            *self._overshoot(row, loss),
            *self._rise(row, slow, fast),
            *self._at_chance(row, loss, slow, fast),
        ]

    def finish(self, step: int) -> Iterable[Event]:
        return [self._tell_overshoot()] if self.early.open else ()

    @property
    def nearing_chance(self) -> bool:
        """The loss has been at chance level for a fifth of the rows that would decide it."""
        return self.at_chance.length >= max(10, self._chance_hold // 5)

    def confirm(self, row: Row, because: str) -> Iterable[Event]:
        """Take chance level for certain before its time, on the evidence of another marker."""
        if self.told_chance:
            return ()
        return [self._tell_chance(row, because)]

    def _rise(self, row: Row, slow: float, fast: float) -> Iterable[Event]:
        assert self.best is not None
        limit = self.best + max(self.rise, self.rise_sigmas * self.best_noise)
        if self.risen.extend(slow > limit and fast > limit, row.step) != self._hold:
            return ()
        return [
            event(
                self.name,
                kind="rise",
                quantity="loss",
                first_step=self.risen.first_step,
                last_step=row.step,
                detected_at=row.step,
                verdict="DIVERGED",
                flag="LOSS_ROSE",
                stop=self.stop,
                message=f"loss rose from {self.best:.4g} (step {self.best_step}) to {slow:.4g} "
                f"and stayed there for {self._hold} rows",
                smoothed=slow,
                lowest=self.best,
                lowest_step=self.best_step,
                limit=limit,
                rows=self._hold,
            )
        ]

    def _at_chance(self, row: Row, loss: float, slow: float, fast: float) -> Iterable[Event]:
        if self._chance is None:
            return ()
        band = self.chance_band
        holds = (
            row.step > self._settled
            and abs(slow - self._chance) < band
            and abs(fast - self._chance) < 2.0 * band
        )
        length = self.at_chance.extend(holds, row.step)
        if length <= 1:
            self.halves = [0.0, 0.0]
        if not length:
            self.told_chance = False
            return ()
        if length > self._chance_hold or self.told_chance:
            return ()
        half = self._chance_hold // 2
        self.halves[length > half] += loss
        if length < self._chance_hold:
            return ()
        fell = self.halves[0] / half - self.halves[1] / (length - half)
        noise = (self.roughness.mean / 2.0) ** 0.5
        if fell > max(0.2 * band, 3.0 * noise * (4.0 / length) ** 0.5):
            self.at_chance.extend(False, row.step)  # it learns, if slowly: begin anew
            return ()
        return [self._tell_chance(row, "")]

    def _tell_chance(self, row: Row, because: str) -> Event:
        assert self._chance is not None
        self.told_chance = True
        return event(
            self.name,
            kind="chance",
            quantity="loss",
            first_step=self.at_chance.first_step,
            last_step=row.step,
            detected_at=row.step,
            verdict="DIVERGED",
            flag="CHANCE_LEVEL",
            stop=self.stop,
            message=f"loss stays at {self.slow.mean:.4g}, chance level is ln(batch) = "
            f"{self._chance:.4g}: the model tells no pair from another" + because,
            smoothed=self.slow.mean,
            chance=self._chance,
            lowest=self.best,
            rows=self.at_chance.length,
            grad_norm=row.get("grad_norm"),
            grad_norm_first=self.first_norm,
        )

    def _overshoot(self, row: Row, loss: float) -> Iterable[Event]:
        assert self.first is not None
        limit = self.first + self.overshoot
        if self.seen <= self._early_rows and loss > limit:
            if self.early.hit(self.seen, row.step, loss, self.first):
                return [self._tell_overshoot()]
        return [self._tell_overshoot()] if self.early.ended(self.seen) else ()

    def _tell_overshoot(self) -> Event:
        began, peak = self.early.first[3], self.early.peak[2]
        return event(
            self.name,
            kind="overshoot",
            quantity="loss",
            first_step=self.early.first_step,
            last_step=self.early.last_step,
            detected_at=self.early.last_step,
            verdict="SPIKY",
            flag="OVERSHOOT",
            message=f"loss began at {began:.4g} and first climbed to {peak:.4g} "
            f"(step {self.early.peak_step})",
            began=began,
            peak=peak,
            peak_step=self.early.peak_step,
        )
