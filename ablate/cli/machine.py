"""Verbs about machines and data."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from ablate.api import RUNS, open_cluster
from ablate.cli.progress import showing
from ablate.cli.terminal import JsonOption, RunsOption, err, out, print_json
from ablate.trial.recipe import find_data_sets
from ablate.words import counted

if TYPE_CHECKING:
    from ablate.runner.doctor import Finding
    from ablate.training.data.web_pairs import Download

app = typer.Typer()


@app.command()
def doctor(
    runs: RunsOption = RUNS,
    study: Annotated[
        Path | None, typer.Option("--cluster", help="Probe the cluster for this study's gangs.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to probe; a private one if left out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether this machine, or each node, is ready."""
    from ablate.runner.doctor import examine

    findings = examine(runs)
    if study is not None:
        findings += _probe(study, runs, address)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        marks = {"ok": ("ok", "green"), "warning": ("!!", "yellow"), "error": ("no", "red")}
        for finding in findings:
            mark, style = marks[finding.level]
            line = Text.assemble((mark, style), f"  {finding.subject:<16} {finding.message}")
            out.print(line, soft_wrap=True)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


def _probe(study: Path, runs: Path, address: str | None) -> list[Finding]:
    from ablate.records.folder import StudyRecord
    from ablate.runner import preflight
    from ablate.runner.plan.plan import plan as make_plan
    from ablate.study import load_study
    from ablate.study.data import data_of

    loaded = load_study(study)
    record = StudyRecord(runs / loaded.name)
    made = make_plan(loaded, record, deep=True)
    with open_cluster(loaded.recipe, "ray", address=address) as machines:
        return preflight.examine(
            machines,
            shape=loaded.gang.shape(),
            folder=record.folder,
            data=[path for paths in data_of(loaded).values() for path in paths],
            checkpoints=loaded.checkpoints,
            need_gib=made.disk_gib,
            shared_gib=made.shared_gib,
        )


class _AlsoOfRecipes(TyperGroup):
    """The verbs below, and one for each data set that a recipe knows how to prepare."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *find_data_sets()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or _verb_of(cmd_name)


def _verb_of(name: str) -> Any:
    prepare = find_data_sets().get(name)
    if prepare is None:
        return None
    verb = typer.Typer(add_completion=False, rich_markup_mode=None)

    def data_set(
        folder: Annotated[Path, typer.Argument(help="Folder of class folders.")],
        labels: Annotated[
            Path | None,
            typer.Option(help="Text that names image and class in a line, of a flat folder."),
        ] = None,
        classes: Annotated[
            int | None, typer.Option(min=2, help="Classes there should be, of a part of it.")
        ] = None,
        as_json: JsonOption = False,
    ) -> None:
        options = {} if classes is None else {"classes": classes}
        with showing(err, "looking at the images") as work:
            found = prepare(folder, labels=labels, tell=work.counter("images"), **options)
        if as_json:
            print_json({"folder": str(folder), **asdict(found)})
        else:
            facts = "; ".join(f"{key}: {value}" for key, value in found.facts.items())
            out.print(f"{folder}: {facts}", markup=False, soft_wrap=True)
            for problem in found.problems:
                out.print(f"no  {problem}", style="red", markup=False, soft_wrap=True)
        if found.problems:
            raise typer.Exit(1)

    data_set.__doc__ = (inspect.getdoc(prepare) or "").partition("\n\n")[0].replace("``", "")
    verb.command(name)(data_set)
    return typer.main.get_command(verb)


data_app = typer.Typer(no_args_is_help=True, cls=_AlsoOfRecipes, help="Prepare data sets.")


app.add_typer(data_app, name="data")


@data_app.command("emoji")
def data_emoji(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("data/emoji"),
) -> None:
    """Emoji of four vendors to train on, and two unseen styles."""
    from ablate.training.data.emoji import prepare_emoji

    found = prepare_emoji(folder)
    out.print(
        f"{folder}: {found.train_num_samples} training pairs, {found.num_classes} held-out "
        f"classes (chance {found.chance:.2%}). Licences: {folder / 'LICENSES.md'}",
        soft_wrap=True,
    )


@data_app.command("emoji-video")
def data_emoji_video(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("data/emoji-video"),
) -> None:
    """Emoji in motion: clips with classes and with captions."""
    from ablate.training.data.emoji_video import prepare_emoji_video

    found = prepare_emoji_video(folder)
    out.print(
        f"{folder}: {found.train_clips} training clips and {found.val_clips} held-out ones of "
        f"{found.num_classes} motions (chance {1 / found.num_classes:.2%}), with captions in "
        f"train.json and val.json. Licences: {folder / 'LICENSES.md'}",
        soft_wrap=True,
    )


@data_app.command("emoji-groups")
def data_emoji_groups(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("data/emoji-groups"),
) -> None:
    """The emoji as folders of classes, for models without text."""
    from ablate.training.data.emoji_groups import prepare_emoji_groups

    found = prepare_emoji_groups(folder)
    out.print(
        f"{folder}: {found.train} images to train on, {found.val} held out in "
        f"{len(found.classes)} groups. Licences: {folder / 'LICENSES.md'}",
        soft_wrap=True,
    )


@data_app.command("cc3m")
def data_cc3m(
    folder: Annotated[Path, typer.Argument(help="Folder of the download.")] = Path("data/cc3m"),
    links: Annotated[
        Path | None, typer.Option(help="The list: Train_GCC-training.tsv, as it comes.")
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Run img2dataset, not only print its line.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say how to download CC3M, and whether a download is whole.

    With --links the list gets the header that img2dataset needs, and its line is printed, or run
    with --fetch. Of a download: pairs, dead links and why, faults, fingerprint.
    """
    from ablate.training.data import web_pairs

    if links is not None:
        named, count = web_pairs.with_header(links, folder)
        line = web_pairs.command(named, folder)
        if not fetch:
            told = {"links": count, "command": line}
            if as_json:
                print_json(told)
                return
            out.print(f"{count:,} links. Download them with", markup=False)
            out.print(shlex.join(line), markup=False, soft_wrap=True)
            out.print(f"and then: ablate data cc3m {folder}", markup=False, soft_wrap=True)
            return
        web_pairs.fetch(line)
    with showing(err, "reading shards") as work:
        found = web_pairs.look_at(folder, on_shard=work.counter("shards"))
    if as_json:
        print_json(_told(found))
    else:
        _say_download(folder, found)
    if found.problems:
        raise typer.Exit(1)


def _told(found: Download) -> dict[str, object]:
    return {
        "train_data": found.pattern,
        "train_num_samples": found.index.num_samples,
        "fingerprint": found.index.fingerprint,
        "asked": found.asked,
        "arrived": found.arrived,
        "share_lost": found.share_lost,
        "reasons": dict(found.reasons),
        "faults": found.index.num_faults,
        "problems": list(found.problems),
    }


def _say_download(folder: Path, found: Download) -> None:
    index = found.index
    out.print(
        f"{folder}: {counted(len(index.shards), 'shard')}, {index.num_samples:,} pairs of "
        f"{found.asked:,} links ({found.share_lost:.1%} lost), fingerprint "
        f"{index.fingerprint[:12]}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    for why, number in list(found.reasons.items())[:5]:
        out.print(f"{number:>9,} {why}", style="dim", markup=False, soft_wrap=True)
    for kind, number in index.num_faults.items():
        out.print(f"{number:>9,} {kind} (ablate data check names them)", markup=False)
    for problem in found.problems:
        out.print(f"no  {problem}", style="red", markup=False, soft_wrap=True)
    out.print(f"train_data: {found.pattern}", markup=False, soft_wrap=True)
    out.print(f"train_num_samples: {index.num_samples}", markup=False)


@data_app.command("pack")
def data_pack(
    pairs: Annotated[
        Path, typer.Argument(help="List of pictures and captions; its first line names them.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write the shards.")],
    image: Annotated[str, typer.Option(help="Column of the pictures' paths.")] = "filepath",
    caption: Annotated[str, typer.Option(help="Column of the captions.")] = "title",
    per_shard: Annotated[int, typer.Option(min=1, help="Pairs in a shard.")] = 1000,
) -> None:
    """Pack a CSV of pictures and captions into shards."""
    from ablate.training.data.pair_list import pack, read_pairs

    with showing(err, "looking at the pictures") as work:
        found = read_pairs(pairs, image=image, caption=caption)
        pattern = pack(found, folder, per_shard=per_shard, on_shard=work.counter("writing shards"))
    out.print(f"train_data: {pattern}", markup=False, soft_wrap=True)
    out.print(f"train_num_samples: {len(found)}", markup=False)


@data_app.command("check")
def data_check(
    shards: Annotated[
        str, typer.Argument(help="Shards of images and captions, e.g. 'cc3m/{0000..0331}.tar'.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what training would meet in shards, and where."""
    from rich.progress import Progress

    from ablate.training.data.shard_scan import FAULTS
    from ablate.training.data.shards import index_shards

    with Progress(console=err, transient=True) as progress:
        task = progress.add_task("reading shards", total=None)
        index = index_shards(
            shards,
            cache=None,
            on_shard=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(
            {
                "shards": len(index.shards),
                "samples": index.num_samples,
                "fingerprint": index.fingerprint,
                "faults": [asdict(fault) for fault in index.faults],
            }
        )
        return
    out.print(
        f"{counted(len(index.shards), 'shard')}, {counted(index.num_samples, 'sample')}, "
        f"fingerprint {index.fingerprint[:12]}",
        markup=False,
    )
    for kind, number in sorted(index.num_faults.items(), key=lambda item: -item[1]):
        share = number / (index.num_samples + number)
        out.print(f"{number:>8} {kind} ({share:.2%}): {FAULTS[kind]}", markup=False, soft_wrap=True)
        where = [str(fault) for fault in index.faults if fault.kind == kind]
        for line in where[:3]:
            out.print(f"         {line}", style="dim", markup=False, soft_wrap=True)
    if not index.faults:
        out.print("No faults.")
