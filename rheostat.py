"""The ``rheostat`` command. Everything heavy is imported by the command that needs it."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from models.errors import RheostatError
from server.commands import policy as policy_commands
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

app.add_typer(policy_commands, name="policy")

DATA_HELP = (
    "A .jsonl, .json, .csv, .tsv or .parquet file; or a .yaml file with a list of sources, as "
    "data.train in a recipe."
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
    that bring none, as a JSON `refusal` object; RHEOSTAT_POLICY_FILE, instead of them, policies
    and who may follow them (docs/policies.md).
    """
    from models.checkpoint import load_checkpoint, resolve_checkpoint
    from server.dials.calibrations import load_calibrations
    from server.lifetime import ignore_hangups
    from server.policies.loading import Served
    from server.policies.reloading import Policies
    from server.settings import load_settings

    logging.getLogger("server").setLevel(logging.INFO)
    logging.getLogger("server").addHandler(logging.StreamHandler())
    settings = load_settings()
    directory = resolve_checkpoint(model, revision)
    manifest, _ = load_checkpoint(directory)
    calibrations = load_calibrations(directory, manifest)
    policies = Policies(settings, Served(manifest, calibrations))
    if settings.policy_file is not None:
        ignore_hangups()

    from server import engine

    arguments = ["--model", str(directory), *ctx.args]
    if str(directory) != model and "--served-model-name" not in ctx.args:
        arguments += ["--served-model-name", model]
    engine.serve(engine.parse_flags(arguments), manifest, settings, policies)


@app.command(
    epilog="Examples: rheostat train demo; rheostat train qwen-instruct-lora --dry-run; rheostat "
    "train mine.yaml --out checkpoints/mine. On several GPUs: accelerate launch "
    "--config_file training/fsdp/8gpu.yaml -m rheostat train llama-8b-full."
)
def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="A YAML file, or a recipe of the package: demo, single-token, qwen-instruct-lora, "
            "llama-8b-full."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where the checkpoint goes. [default: checkpoints/NAME]")
    ] = None,
    force: Annotated[bool, typer.Option(help="Train again over a finished checkpoint.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show counts, lengths, samples and time; train and write nothing."
        ),
    ] = False,
) -> None:
    """Train a checkpoint with refusal tokens from a recipe.

    The recipe says what the model starts from, what it learns from, with which losses, and what is
    measured on the way; start with --dry-run, which shows the rows as the model would see them.

    Everything is written to OUT.partial, which takes OUT's name when it is done. A run that was
    killed goes on from its last resume point when the same command is given again, and reaches the
    same losses. A finished checkpoint of the same recipe and data is kept.
    """
    from training.config.recipe import load_config
    from training.run.processes import is_first_process
    from training.run.train import train as train_checkpoint

    recipe = load_config(config)
    if dry_run:
        from rich.console import Console

        from training.run.preview import dry_run as show

        show(recipe, Console())
        return
    directory = train_checkpoint(recipe, out or Path("checkpoints") / recipe.name, force=force)
    if is_first_process():
        typer.echo(f"{directory}: ready for `rheostat serve --model {directory}`")


@app.command()
def evaluate(
    url: Annotated[str, typer.Option(help="A running Rheostat server.")] = "http://127.0.0.1:8000",
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help=f"What is asked. {DATA_HELP} [default: the demo's]"
        ),
    ] = None,
    train_data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help=f"What the judge of texts learns from. {DATA_HELP} [default: the demo's]",
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

    from training.config.data import named_sources
    from training.demo_data.render import write
    from training.measure.evaluate import Questions
    from training.measure.evaluate import evaluate as evaluate_server

    with TemporaryDirectory() as rendered:
        if data is None or train_data is None:
            write(Path(rendered), seed=0)
        questions = Questions(
            named_sources(data or Path(rendered) / "evaluation.jsonl"),
            named_sources(train_data or Path(rendered) / "train.jsonl"),
            limit,
            seed,
        )
        report = evaluate_server(url, questions, Console(stderr=True))
    Console().print(report.table())
    if out is not None:
        out.write(report.to_json() + "\n")


@app.command(
    epilog="Flags of vLLM for the server that it starts stand after --, as in: rheostat calibrate "
    "--model DIR --data prompts.jsonl -- --tensor-parallel-size 2",
)
def calibrate(
    model: ModelOption,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Prompts with their categories. Repeatable. " + DATA_HELP,
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="What requests and policies call it.")] = "default",
    limit: Annotated[int | None, typer.Option(min=1, help="Use that many random rows.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of that choice.")] = 0,
    url: Annotated[
        str | None, typer.Option(help="Ask a running server of this checkpoint; else start one.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="For a server that wants one.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for calibrations/. [default: the model's]"),
    ] = None,
    force: Annotated[bool, typer.Option(help="Measure anew over a finished one.")] = False,
    plot: Annotated[bool, typer.Option(help="Draw its figures as PNG files beside it.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Margins that a server recorded: do they still fit? Exit status 3: no.",
        ),
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Check that policy's traffic only.")] = None,
    flags: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Measure how a checkpoint decides on known prompts, so that rates can be asked for.

    Each prompt costs one token. Without --data, --plot
    and --check work on the calibration that is there.
    """
    from rich.console import Console

    from models.calibration import calibration_path, load_calibration
    from models.checkpoint import resolve_checkpoint
    from training.calibration import calibrate as calibration_run
    from training.calibration import figures as calibration_figures
    from training.calibration import report as calibration_report
    from training.calibration.drift import check_recorded
    from training.calibration.prompts import Prompts
    from training.config.data import named_sources
    from training.serving import exit_on_sigterm

    exit_on_sigterm()
    directory = resolve_checkpoint(model)
    path = calibration_path(out or directory, name)
    if data:
        sources = tuple(source for path in data for source in named_sources(path))
        measured = calibration_run.calibrate(
            calibration_run.Job(
                directory,
                Prompts(sources, limit, seed),
                name,
                url,
                api_key,
                tuple(flags or ()),
                out,
                force,
            ),
            Console(stderr=True),
        )
        typer.echo(measured.sentence())
    calibration = load_calibration(path)
    Console().print(calibration_report.summary(calibration))
    if plot:
        for figure in calibration_figures.save_figures(calibration, path.parent):
            typer.echo(figure)
    if check is not None:
        drift = check_recorded(calibration, check, policy=policy)
        Console().print(drift.table())
        if drift.drifted:
            raise typer.Exit(3)


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
