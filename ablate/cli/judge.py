"""Verbs that look into single runs: markers, causes, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ablate.cli.progress import showing
from ablate.cli.terminal import JsonOption, called, err, out, print_json, visible

app = typer.Typer()


class _ReplayByDefault(TyperGroup):
    """`ablate markers RUN` means `ablate markers replay RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["replay", *args]
        return super().parse_args(ctx, args)


markers_app = typer.Typer(
    no_args_is_help=True,
    cls=_ReplayByDefault,
    short_help="Judge runs by their instability markers.",
    help="Judge runs by their instability markers: ablate markers RUN, or markers import FILE.",
)


app.add_typer(markers_app, name="markers")


@markers_app.command("replay")
def markers_replay(
    run: Annotated[Path, typer.Argument(help="Study folder, or the folder of one trial.")],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="MARKER.THRESHOLD=VALUE, e.g. loss_spike.sigma=4; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge recorded trials again, with other thresholds.

    Nothing is trained.
    """
    from ablate.cli.display import render_judgements
    from ablate.report.replay import replay_run

    found = replay_run(run, change or ())
    if as_json:
        print_json(found)
        return
    names = called(run, found)
    told = {names[key]: judgement for key, judgement in found.items()}
    first = sorted(told, key=lambda name: (not name.startswith("baseline "), name))
    out.print(render_judgements({name: told[name] for name in first}))


@markers_app.command("import")
def markers_import(
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV, parquet, lines of JSON, a printed log, TensorBoard event files, or an "
            "open_clip_train out.log."
        ),
    ],
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Global batch size: samples of one softmax.")
    ] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of warmup.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Which column is which: loss=NAME, step=NAME, grad_norm=NAME, ..."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a run that was made elsewhere."""
    from ablate.cli.display import render_judgements
    from ablate.markers.foreign import judge_foreign
    from ablate.trial.trainers import known_trainers

    chosen = [text.partition("=") for text in column or ()]
    if wrong := next((name for name, equals, _ in chosen if not equals), None):
        raise typer.BadParameter(f"{wrong!r}: write QUANTITY=NAME, e.g. loss=train_loss")
    columns = {quantity: name for quantity, _, name in chosen}
    found = judge_foreign(
        file, global_batch=batch_size, warmup=warmup, columns=columns, trainers=known_trainers()
    )
    if as_json:
        print_json(found)
        return
    out.print(render_judgements({visible(str(file)): found}))
    for note in found["notes"]:
        out.print(f"note  {note}", markup=False, soft_wrap=True)


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="Study folder, or the folder of one trial.")],
    flag: Annotated[
        list[str] | None,
        typer.Option(help="A flag to explain in runs that are STABLE too, e.g. BN_DRIFT."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Name likely causes of instability, and what to try."""
    from ablate.cli.display import render_suspects
    from ablate.report.replay import diagnose_run, num_unjudged
    from ablate.words import counted

    found = diagnose_run(run, asked=flag or ())
    if as_json:
        print_json(found)
        return
    names = called(run, found)
    found = {names[key]: suspects for key, suspects in found.items()}
    out.print(render_suspects(found) if found else "The markers saw nothing that needs a cause.")
    if num := num_unjudged(run):
        out.print(f"note  {counted(num, 'trial')} told no loss, and could not be judged")


@app.command("inspect")
def inspect_checkpoints(
    a: Annotated[
        Path,
        typer.Argument(help="Trial folder (its initial weights), checkpoint, .safetensors or .pt."),
    ],
    b: Annotated[
        Path | None,
        typer.Argument(help="The later one; a trial folder stands for its newest checkpoint."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="State dict to take of torch files that hold several.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images (class folders, or .tar); the trial's if left out."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="open_clip model, for files that belong to no trial.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Look at this many images at most.")] = 2048,
    picture: Annotated[
        Path | None, typer.Option(help="Draw both feature spaces by class (PNG, SVG or PDF).")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"],
        typer.Option(help="Where features are computed; a GPU may be a running trial's."),
    ] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Say whether a model learned between two checkpoints.

    Given a trial folder alone, its initial weights are compared with its newest checkpoint.
    """
    import logging

    from ablate.cli.display import render_inspection
    from ablate.training.inspection.inspect import inspect_paths
    from ablate.training.inspection.picture import draw_inspection

    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of weights it did not load
    with showing(err, "looking at the weights") as work:
        found = inspect_paths(a, b, key=key, data=data, model=model, images=images, device=device)
        work.begin("drawing")
        drawn = picture is not None and draw_inspection(found, picture)
    if as_json:
        print_json(found.to_dict())
        return
    out.print(render_inspection(found.to_dict()))
    if drawn:
        out.print(f"picture  {picture}", markup=False, soft_wrap=True)
    elif picture is not None:
        out.print("No picture: there are no features to draw.")
