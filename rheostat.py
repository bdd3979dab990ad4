"""The ``rheostat`` command. Everything heavy is imported by the command that needs it."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from models.errors import RheostatError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
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
    checkpoint is verified before the engine starts.
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
    asyncio.run(engine.serve(engine.parse_flags(arguments), manifest, settings, defaults))


@app.command()
def adopt(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
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
