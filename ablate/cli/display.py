"""What the terminal shows: tables of plans and statuses, and live progress."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ablate.runner.plan.outlines import which
from ablate.words import counted, describe_interruptions, money

if TYPE_CHECKING:  # a verb loads what it shows, and no other's: the statistics take seconds
    from ablate.report.compare import Comparison
    from ablate.report.ladder import Ladder
    from ablate.report.report import Summary
    from ablate.runner.plan.plan import Plan, PlannedTrial
    from ablate.runner.status import Running, StudyStatus

_OUTCOME_STYLES = {
    "completed": "green",
    "diverged": "yellow",
    "pruned": "cyan",
    "failed": "red",
    "infeasible": "red",
    "lost": "red",
    "to run": "dim",
    "begun": "blue",
}

_WIDE = 106
"""Columns of a terminal from which the table of what runs has all of its own."""


class Watch(Protocol):
    """Shows a study's status again and again."""

    def __call__(self, status: StudyStatus) -> None: ...


def duration(seconds: float | None) -> str:
    """A time span for people: ``42 s``, ``3 min 05 s``, ``2 h 07 min``, ``3.2 d``."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{seconds / 86400:.1f} d"


def hours(value: float) -> str:
    """Worker-hours with two significant digits or whole hours."""
    return f"{value:.0f} h" if value >= 10 else f"{value:.2g} h"


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Live progress on a terminal; plain lines, one per change, where there is none."""
    if not console.is_terminal:
        yield PlainWatch(console)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(status: StudyStatus) -> None:
            live.update(render_status(status, width=console.width))

        yield show


class PlainWatch:
    """Prints a line when a trial starts or ends, and one for each evaluation."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: dict[tuple[str, int], Running] = {}
        self._ended = -1
        self._unanswered = 0
        self._notes: tuple[str, ...] = ()

    def __call__(self, status: StudyStatus) -> None:
        now = {(trial.trial_id, trial.attempt): trial for trial in status.running}
        for key, trial in now.items():
            before = self._seen.get(key)
            what = f"{trial.name} · seed {trial.seed} ({trial.trial_id})"
            if before is None:
                again = f", attempt {trial.attempt}" if trial.attempt > 1 else ""
                self._say(f"start   {what}{again}")
            elif trial.objective is not None and trial.epoch != before.epoch:
                if trial.objective != before.objective:
                    self._say(f"measure {what}: {_numbers(trial, status.metric, status.unit)}")
        for silent in status.unanswered[self._unanswered :]:
            reason = silent.reason.splitlines()[-1] if silent.reason else "no reason is known"
            what = f"{silent.name} · seed {silent.seed} ({silent.trial_id})"
            self._say(f"{silent.outcome:<7} {what}: {reason}")
        self._unanswered = len(status.unanswered)
        if status.num_ended != self._ended:
            self._ended = status.num_ended
            self._say(f"study   {_totals(status)}")
        for note in status.notes:
            if note not in self._notes:
                self._say(f"note    {note}")
        self._notes = status.notes
        self._seen = now

    def _say(self, line: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._console.print(f"{stamp} {line}", highlight=False, markup=False, soft_wrap=True)


def render_status(status: StudyStatus, *, width: int = 100) -> RenderableType:
    """A row per running trial and the study's totals."""
    parts: list[RenderableType] = []
    if status.running:
        is_wide = width >= _WIDE
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=False)
        # What the other columns take: a number that is cut off says another number.
        most = width - (88 if is_wide else 67)
        table.add_column("trial", overflow="ellipsis", no_wrap=True, max_width=max(most, 8))
        table.add_column("seed", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        short = status.metric.rpartition("_")[2]
        for name in ("epoch", "loss", short, "left", *(("events", "samples/s") if is_wide else ())):
            table.add_column(name, justify="right", no_wrap=True)
        for trial in status.running:
            cells = _row(trial, status.unit)
            table.add_row(*(cells if is_wide else cells[:-2]))
        parts.append(table)
    bar = ProgressBar(total=max(status.num_trials, 1), completed=status.num_ended, width=28)
    totals = Table.grid(padding=(0, 1))
    totals.add_row(bar, Text(_totals(status)))
    parts.append(totals)
    for silent in status.unanswered:
        lines = silent.reason.splitlines() or ["no reason is known"]
        what = f"{silent.name} · seed {silent.seed} ({silent.trial_id})"
        head = f"{silent.outcome}: {what}: {lines[0]}"
        parts.append(Text(head, style="red"))
        if len(lines) > 1:
            parts.append(Text(f"  {lines[-1]}", style="red"))
    if said := describe_interruptions(status.disruptions):
        parts.append(Text(said, style="dim"))
    if said := status.machines:
        parts.append(Text(f"! {said}", style="yellow"))
    parts += [Text(f"search   {line}") for line in status.search]
    parts += [Text(f"pruning  {line}", style="dim") for line in status.pruning]
    parts += [Text(f"! {note}", style="yellow") for note in status.notes]
    return Group(*parts)


def _row(trial: Running, unit: str) -> tuple[RenderableType, ...]:
    share = trial.step / trial.steps_total if trial.steps_total else 0.0
    again = f" (attempt {trial.attempt})" if trial.attempt > 1 else ""
    return (
        trial.name + again,
        str(trial.seed),
        ProgressBar(total=1.0, completed=share, width=12)
        if trial.step
        else Text(trial.phase, style="dim"),
        f"{trial.epoch:.1f}",
        "" if trial.loss is None else f"{trial.loss:.3f}",
        _score(trial.objective, unit),
        duration(trial.eta_s) if trial.eta_s is not None else "",
        Text(str(trial.num_events), style="yellow" if trial.num_events else "dim"),
        "" if trial.samples_per_s is None else f"{trial.samples_per_s:,.0f}",
    )


def _score(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if unit == "fraction" else f"{value:.4g}"


def _numbers(trial: Running, metric: str, unit: str) -> str:
    loss = "" if trial.loss is None else f", loss {trial.loss:.3f}"
    speed = "" if trial.samples_per_s is None else f", {trial.samples_per_s:,.0f} samples/s"
    events = f", {trial.num_events} marker events" if trial.num_events else ""
    left = f", {duration(trial.eta_s)} left" if trial.eta_s is not None else ""
    value = _score(trial.objective, unit) or "?"
    return f"epoch {trial.epoch:.1f}, {metric} {value}{loss}{speed}{events}{left}"


def _totals(status: StudyStatus) -> str:
    """Such as: 9 of 14 ended (8 completed, 1 diverged), 1 running, 4 waiting, about 5 min left."""
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(status.outcomes.items()))
    ended = f"{status.num_ended} of {status.num_trials} ended" + (f" ({kinds})" if kinds else "")
    parts = [ended, f"{len(status.running)} running"]
    if status.interrupted:
        parts.append(f"{status.interrupted} interrupted")
    parts.append(f"{status.waiting - status.interrupted} waiting")
    parts.append(f"{hours(status.worker_hours)} of workers spent")
    if status.price is not None:
        parts.append(f"{money(status.price)} spent by budget's price")
    if status.eta_s is not None and (status.running or status.waiting):
        these = " for the trials asked so far" if status.search else ""
        parts.append(f"about {duration(status.eta_s)} left{these}")
    return ", ".join(parts)


_ROLE_STYLES = {"better": "green", "worse": "red", "same": "cyan", "open": "yellow"}


def render_summary(summary: Summary) -> RenderableType:
    """The answer: a sentence per factor, then a row per contrast with the baseline."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("setting", overflow="fold", min_width=16)
    columns: dict[str, Sequence[str | Text]] = {
        summary.unit: [row.delta for row in summary.rows],
        "95 % interval": [row.interval for row in summary.rows],
        "verdict": [Text(row.verdict, _ROLE_STYLES.get(row.role, "")) for row in summary.rows],
        "diverged": [row.diverged for row in summary.rows],
        "seeds": [row.needs_seeds for row in summary.rows],
    }
    if all(row.diverged.startswith("0/") for row in summary.rows):
        del columns["diverged"]
    if not any(row.needs_seeds for row in summary.rows):
        del columns["seeds"]
    for name in columns:
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    for i, row in enumerate(summary.rows):
        setting = Text(f"{row.factor}: {row.reference} → {row.level}")
        table.add_row(setting, *(cells[i] for cells in columns.values()))
    counts = ", ".join(f"{count} {state}" for state, count in summary.counts)
    parts: list[RenderableType] = [Text.assemble((summary.name, "bold"), f": {counts}")]
    parts += [table] if summary.rows else []
    parts += [Text(line) for line in summary.headlines]
    for text, code in summary.next:
        parts.append(Text(f"next: {text}" + (f"  {code}" if code else ""), style="dim"))
    return Group(*parts)


_MOST_CELLS = 200
"""Rows of a plan that anybody reads."""


def render_plan(plan: Plan, *, full: bool = False) -> RenderableType:
    """The plan as a table of cells with their trials, then cost, resolution and notes."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("cell", overflow="fold")
    table.add_column("seeds", justify="right")
    table.add_column("steps", justify="right")
    table.add_column("trials")
    of_cell: dict[str, list[PlannedTrial]] = {}
    for trial in sorted(plan.trials, key=lambda trial: trial.seed):
        of_cell.setdefault(trial.name, []).append(trial)
    shown = plan.cells if full else plan.cells[:_MOST_CELLS]
    for name in shown:
        trials = of_cell[name]
        ids = Text()
        for trial in trials if full or len(trials) <= 6 else trials[:6]:
            style = _OUTCOME_STYLES.get(trial.state, "")
            ids.append(trial.trial_id, style=style)
            ids.append(" " if trial.state == "to run" else f" {trial.state} ", style=style)
        steps = trials[0].steps
        seeds = ", ".join(str(trial.seed) for trial in trials)
        table.add_row(name, seeds, "?" if steps is None else f"{steps:,}", ids)
    head = Text.assemble(
        (plan.study, "bold"),
        f": {plan.design}, {counted(len(plan.cells), 'cell')} x "
        f"{counted(len(plan.seeds), 'seed')}, {counted(len(plan.trials), 'trial')} of "
        f"{counted(plan.workers, 'worker')}; {len(plan.to_run)} to run",
    )
    more = len(plan.cells) - len(shown)
    rest = [Text(f"and {more:,} more cells; all of them: --json", style="dim")] if more else []
    return Group(head, table, *rest, _facts_of(plan))


def _facts_of(plan: Plan) -> Table:
    """Cost, disk, what can be shown, and notes, each behind its name."""
    facts = Table.grid(padding=(0, 2))  # a long line goes on below its own beginning
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    if plan.cost is not None:
        cost = plan.cost
        beside = "gang" if cost.concurrency == 1 else "gangs"
        facts.add_row(
            "cost",
            f"{hours(cost.worker_hours_p50)} of workers (p90 {hours(cost.worker_hours_p90)}), "
            f"about {duration(cost.makespan_hours * 3600)} with {cost.concurrency} {beside} at a "
            f"time; from {cost.basis}",
        )
    if plan.cost is not None and plan.cost.price_p50 is not None:
        most = money(plan.cost.price_p90 or 0.0)
        facts.add_row("price", f"{money(plan.cost.price_p50)} (p90 {most}) by budget's price")
    if plan.cost_note:
        facts.add_row("cost", Text(plan.cost_note))
    if plan.disk_gib is not None:
        facts.add_row("disk", f"up to {plan.disk_gib:.1f} GiB of checkpoints")
    if plan.detectable is None:
        facts.add_row("resolves", Text(plan.detectable_in, style="yellow"))
    else:
        value = f"{plan.detectable:.2g} {plan.detectable_in}"
        facts.add_row(
            "resolves",
            Text(
                f"true differences to the baseline of {value} or more, with probability 0.8 or "
                "more; smaller ones need more seeds"
            ),
        )
        finer: dict[str, list[str]] = {}
        for factor, level, size in plan.resolution:
            if size < 0.99 * plan.detectable:
                finer.setdefault(f"{size:.2g}", []).append(f"{factor}={level}")
        for amount, names in finer.items():
            facts.add_row("", Text(f"of {amount} for {', '.join(names)}, averaged over cells"))
    for groups in plan.groups:
        facts.add_row(groups.label, Text(which(groups.cells, plan.cells) + groups.sentence))
    for note in plan.notes:
        facts.add_row("note", Text(note), style="yellow")
    return facts


_VERDICT_STYLES = {"STABLE": "green", "SPIKY": "yellow", "DEGRADED": "yellow"}


def render_judgements(found: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """A row per judged run with its verdict, then a row per event."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("run", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("what was seen", overflow="fold")
    for name, judgement in found.items():
        if not judgement["rows"]:
            table.add_row(Text(name), Text("-"), "", Text("no step recorded yet", style="dim"))
            continue
        verdict = Text(judgement["verdict"], _VERDICT_STYLES.get(judgement["verdict"], "red"))
        flags = Text(", ".join(judgement["flags"]), style="bold")
        recorded = judgement.get("recorded")
        if recorded and recorded["verdict"] != judgement["verdict"]:
            flags.append(
                f"  was {recorded['verdict']} when it ended (rules of version "
                f"{recorded['version']}, now {judgement['version']})",
                style="yellow",
            )
        table.add_row(Text(name), verdict, "", flags)
        for event in judgement["events"]:
            steps = f"{event['first_step']}-{event['last_step']}"
            table.add_row("", Text(event["severity"], style="dim"), steps, Text(event["message"]))
    return table


def render_comparison(found: Comparison) -> RenderableType:
    """What differs between two studies, then a row for each effect."""
    parts: list[RenderableType] = []
    if found.differences:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
        for name in ("differs in", "", found.one, found.two):
            table.add_column(name, overflow="fold")
        for item in found.differences:
            table.add_row(item.kind, Text(item.name), Text(item.one), Text(item.two))
        parts.append(table)
    else:
        parts.append(Text("The same question, code and data."))
    effects = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in (found.metric, found.one, found.two, "both together"):
        effects.add_column(name, overflow="fold")
    for pair in found.effects:
        name = f"{pair.factor}={pair.level}"
        found_by = (pair.one, pair.two, pair.pooled)
        effects.add_row(Text(name), *(Text(effect.said if effect else "-") for effect in found_by))
    parts.append(effects)
    parts.append(Text(f"{counted(found.shared_cells, 'cell')} in both.", style="dim"))
    return Group(*parts)


def render_ladder(found: Ladder) -> RenderableType:
    """A row for each rung: its cost, and how far its verdicts are the whole study's."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in (
        "rung",
        "cost of a run",
        "same verdict",
        "95 %",
        "opposite",
        "ranks (tau)",
        "95 %",
    ):
        table.add_column(name, overflow="fold")
    for rung in found.rungs:
        agreement = rung.found
        share, ranks = agreement.interval, agreement.tau_interval
        table.add_row(
            Text(rung.name),
            "?" if rung.cost is None else f"{rung.cost:.0%}",
            f"{agreement.same} of {agreement.of}",
            "" if share is None else f"{share[0]:.0%} to {share[1]:.0%}",
            str(agreement.against),
            "" if agreement.tau is None else f"{agreement.tau:.2f}",
            "" if ranks is None else f"{ranks[0]:.2f} to {ranks[1]:.2f}",
        )
    return table


def render_suspects(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> RenderableType:
    """Each run, and below it its likely causes, the most likely first, with what speaks for each
    and what to try."""
    parts: list[RenderableType] = []
    for name, suspects in found.items():
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for suspect in suspects:
            table.add_row(f"{suspect['score']:.2f}", Text(suspect["cause"], style="bold"))
            table.add_row("", Text(f"because {'; '.join(suspect['evidence'])}"))
            tries = (f"{factor}: {what}" for factor, what in suspect["factors"].items())
            if told := "; ".join(tries):
                table.add_row("", Text(f"try {told}", style="cyan"))
        parts += [Text(name, style="bold"), Padding(table, (0, 0, 1, 2))]
    return Group(*parts)


_LEARNING_STYLES = {"learning": "green", "not learning": "yellow", "collapsed": "red"}
_MODULE_ROWS = 12


def render_inspection(found: Mapping[str, Any]) -> RenderableType:
    """What moved by module, what features are worth on either side, and the verdict."""
    modules = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    modules.add_column("module", no_wrap=True)
    for name in ("tensors", "moved", "relative change"):
        modules.add_column(name, justify="right", no_wrap=True)
    for module in found["modules"][:_MODULE_ROWS]:
        modules.add_row(
            Text(module["name"]),
            str(module["tensors"]),
            str(module["moved"]),
            f"{module['relative']:.3g}",
        )
    left = len(found["modules"]) - _MODULE_ROWS
    frozen = f", {found['frozen']} frozen by the configuration" if found["frozen"] else ""
    parts: list[RenderableType] = [
        Text(f"A  {found['a']}\nB  {found['b']}"),
        Text(f"{found['moved']} of {found['parameters']} parameter tensors moved{frozen}"),
        modules,
    ]
    if left > 0:
        parts.append(Text(f"and {left} modules that moved less (all in --json)", style="dim"))
    if "features" in found:
        parts.append(_feature_table(found))
    parts += [Text(f"!!  {flag}", style="yellow") for flag in found["flags"]]
    parts += [Text(f"--  not judged: {what}", style="dim") for what in found["not_judged"]]
    verdict = Text(found["verdict"], style=_LEARNING_STYLES.get(found["verdict"], "bold"))
    parts.append(Text.assemble("verdict  ", verdict, ": ", "; ".join(found["reasons"])))
    return Group(*parts)


def _feature_table(found: Mapping[str, Any]) -> RenderableType:
    title = f"{found['images']} images of {found['classes']} classes (chance {found['chance']:.2%})"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left")
    table.add_column("features", no_wrap=True)
    for name in ("A", "B", "gain of B"):
        table.add_column(name, justify="right", no_wrap=True)

    def score(value: Mapping[str, float] | None) -> str:
        if value is None:
            return "-"
        low, high = 100 * value["low"], 100 * value["high"]
        return f"{value['value']:.1%} ({low:.1f}..{high:.1f})"

    sides = found["features"]
    asked = {"knn": "neighbours", "linear": "linear probe"}
    asked |= {name: name.replace("_", "-") for name in found["gains"] if name not in asked}
    for name, label in asked.items():
        gain = found["gains"].get(name)
        table.add_row(label, score(sides["a"][name]), score(sides["b"][name]), score(gain))
    for name, label in (("rank", "rank"), ("spread", "spread")):
        table.add_row(label, f"{sides['a'][name]:.3g}", f"{sides['b'][name]:.3g}", "")
    table.add_row("CKA with A", "", f"{found['cka']:.3f}", "")
    return table


def render_contrasts(contrasts: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A row per contrast of results that were made elsewhere, then a sentence for each."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("setting", overflow="fold", min_width=8)
    for name in ("difference", "95 % interval", "adj. p", "verdict"):
        table.add_column(name, justify="right", no_wrap=True)
    diverged = any(item["diverged"][0] for item in contrasts)
    if diverged:
        table.add_column("diverged", justify="right")
    for item in contrasts:
        low, high = item["ci"] or (None, None)
        table.add_row(
            Text(f"{item['factor']}={item['level']}"),
            _signed(item["delta"]),
            "-" if low is None else f"{low:+.3g} to {high:+.3g}",
            "-" if item["p_adjusted"] is None else f"{item['p_adjusted']:.2g}",
            Text(item["verdict"].lower()),
            *(["/".join(map(str, item["diverged"]))] if diverged else []),
        )
    told = (
        f"{item['factor']}: {item['sentence']} {_noted(item['warnings'])}" for item in contrasts
    )
    return Group(table, *(Text(text.rstrip()) for text in told))


def _noted(warnings: Sequence[str]) -> str:
    return " ".join(f"({warning})" for warning in warnings)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4g}"
