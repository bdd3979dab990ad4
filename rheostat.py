"""The ``rheostat`` command. Everything heavy is imported by the command that needs it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from models.errors import RheostatError
from server.lifetime import end_with_parent

# vLLM spawns its engine and its workers, and a spawned process imports this module again.
end_with_parent()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Serve one language model with a refusal dial per category and request.",
)

ModelOption = Annotated[
    str, typer.Option("--model", help="A checkpoint folder with rheostat.json, or a hub name.")
]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: rheostat serve --model checkpoints/demo --port 8000 --enforce-eager. "
    "`python -m vllm.entrypoints.launchers.api_server.entry --help` lists vLLM's flags.",
)
def serve(
    ctx: typer.Context,
    model: ModelOption,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Serve a checkpoint over vLLM's OpenAI-compatible API, with the `refusal` object.

    Every other flag goes to vLLM's server as it is (--port, --tensor-parallel-size, ...). The
    checkpoint is verified before the engine starts. RHEOSTAT_DEFAULTS holds the dials of requests
    that bring none, as a JSON `refusal` object.
    """
    from models.checkpoint import load_checkpoint, resolve_checkpoint
    from server.protocol import resolve_controls
    from server.settings import load_settings

    settings = load_settings()
    directory = resolve_checkpoint(model, revision)
    manifest, _ = load_checkpoint(directory)
    defaults = resolve_controls(settings.defaults, settings.defaults, manifest.names)

    from server import engine

    arguments = ["--model", str(directory), *ctx.args]
    if str(directory) != model and "--served-model-name" not in ctx.args:
        arguments += ["--served-model-name", model]
    engine.serve(engine.parse_flags(arguments), manifest, settings, defaults)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A recipe's name (demo) or a YAML file.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the checkpoint goes. [default: checkpoints/NAME]")
    ] = None,
    force: Annotated[bool, typer.Option(help="Train again over a finished checkpoint.")] = False,
) -> None:
    """Train a checkpoint with refusal tokens.

    A finished checkpoint of the same recipe is kept; a run that was interrupted leaves nothing
    that looks finished.
    """
    from training.config import load_config
    from training.train import train as train_checkpoint

    recipe = load_config(config)
    directory = train_checkpoint(recipe, out or Path("checkpoints") / recipe.name, force=force)
    typer.echo(f"{directory}: ready for `rheostat serve --model {directory}`")


@app.command()
def evaluate(
    url: Annotated[str, typer.Option(help="A running Rheostat server.")] = "http://127.0.0.1:8000",
    data: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="[default: the demo's]")
    ] = None,
    train_data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="What the judge of texts learns from. [default: the demo's]",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use that many random rows.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    out: Annotated[
        typer.FileTextWrite | None,
        typer.Option(lazy=False, help="Also write the report there as JSON."),
    ] = None,
) -> None:
    """Measure how a served checkpoint decides, and whether its text follows the token.

    Asks the server that runs at --url. Without --data and --train-data, the demo's own are
    rendered.
    """
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from training.client import evaluate as evaluate_server
    from training.demo_data.render import write

    with TemporaryDirectory() as rendered:
        if data is None or train_data is None:
            write(Path(rendered), seed=0)
        report = evaluate_server(
            url.removesuffix("/").removesuffix("/v1"),
            data or Path(rendered) / "evaluation.jsonl",
            train_data=train_data or Path(rendered) / "train.jsonl",
            limit=limit,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
    Console().print(report.table())
    if out is not None:
        out.write(report.to_json() + "\n")


@app.command()
def demo_data(
    out: Annotated[Path, typer.Option(file_okay=False, help="A folder; made where it is missing.")],
    seed: Annotated[int, typer.Option(help="Another seed, other sentences.")] = 0,
) -> None:
    """Render the demo's prompts and answers: train, calibration and evaluation as JSON lines."""
    from training.demo_data.render import write

    out.mkdir(parents=True, exist_ok=True)
    for name, rows in write(out, seed).items():
        typer.echo(f"{out / name}.jsonl: {rows} rows")


@app.command()
def demo(
    checkpoint: Annotated[
        Path, typer.Option(help="Where the demo checkpoint is, or will be trained to.")
    ] = Path("checkpoints/demo"),
    port: Annotated[int, typer.Option(help="Of the server, on loopback.")] = 8000,
    once: Annotated[bool, typer.Option(help="End after the show.")] = False,
) -> None:
    """Train the demo checkpoint once, serve it, and turn two dials before your eyes."""
    from training.demo import run

    run(checkpoint, port, once=once)


@app.command()
def adopt(
    directory: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="The checkpoint's folder.")
    ],
    chat_template: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A Jinja file to serve it with."),
    ] = None,
) -> None:
    """Write the manifest of a checkpoint that its authors gave refusal tokens.

    Knows the tokens of the refusal-token paper's published Llama-3 checkpoints
    (arXiv 2412.06748).
    """
    from models.checkpoint import adopt as adopt_checkpoint

    manifest = adopt_checkpoint(directory, chat_template)
    typer.echo(f"{directory / 'rheostat.json'}: {', '.join(manifest.names)}")


def main() -> None:
    """Runs the command line; an error raised on purpose is one line and exit status 1."""
    try:
        app()
    except RheostatError as error:
        typer.echo(f"rheostat: {error.message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
