"""The commands that change the categories of a trained checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from training.commands import DATA_HELP

app = typer.Typer(add_completion=False, rich_markup_mode=None)

CheckpointArgument = Annotated[
    Path,
    typer.Argument(exists=True, file_okay=False, help="Its folder; one of `train: tokens`."),
]


@app.command()
def add_category(
    checkpoint: CheckpointArgument,
    data: Annotated[
        list[Path],
        typer.Option(
            help="Rows of the category, and others if there are. Repeatable. " + DATA_HELP,
        ),
    ],
    name: Annotated[str, typer.Option(help="What requests and policies will call it.")],
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    refusal_text: Annotated[
        str | None, typer.Option(help="What its refusals say. [default: I can't help with that.]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the folds of the cross-validation.")] = 0,
) -> None:
    """Learn one more category; other decisions do not change.

    Calibrations hold for the old weights and are removed: measure them again with `rheostat
    calibrate`. A running server goes on with what it has loaded.
    """
    from training.config.data import named_sources
    from training.run import categories

    sources = [source for path in data for source in named_sources(path)]
    wanted = categories.new_category(name, description, refusal_text)
    added = categories.add_category(checkpoint, wanted, sources, seed)
    typer.echo(
        f"{checkpoint}: {name} is learnt from {added.prompts} prompts; in cross-validation its own "
        f"dial at the default refuses {added.refused:.0%} of them, and {added.others_refused:.1%} "
        f"of the others"
    )
    _tell_removed(added.calibrations)


@app.command()
def remove_category(
    checkpoint: CheckpointArgument,
    name: Annotated[str, typer.Option(help="Of the category.")],
) -> None:
    """Remove one category; other decisions do not change.

    Calibrations are removed as by `add-category`.
    """
    from training.run import categories

    removed = categories.remove_category(checkpoint, name)
    typer.echo(f"{checkpoint}: {name} is removed")
    _tell_removed(removed)


def _tell_removed(calibrations: int) -> None:
    if calibrations:
        typer.echo(f"{calibrations} calibrations of the old weights are removed: calibrate again")
