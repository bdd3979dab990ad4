"""`rheostat evaluate`. Everything heavy is imported when it runs."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.commands import DATA_HELP

if TYPE_CHECKING:
    from training.config.data import Source

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    epilog="Exit status with --gate: 0 every bound is kept, 3 one is broken, 4 one could not be "
    "measured. Examples: rheostat evaluate --out report.json --html report.html; rheostat evaluate "
    "--report report.json --gate gate.yaml; rheostat evaluate --compare old.json new.json.",
)
def evaluate(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="A running Rheostat server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="The key of the server at --url.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help=f"Prompts with labels. Repeatable. {DATA_HELP} [default: the demo's]",
        ),
    ] = None,
    train_data: Annotated[
        Path | None,
        typer.Option(
            help="Rows with responses, which teach what a text does. As --data. [default: the "
            "demo's without --data, else none]",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use that many random rows.")] = None,
    texts: Annotated[
        int, typer.Option(min=0, help="Generate texts for at most so many prompts.")
    ] = 500,
    rules: Annotated[
        bool, typer.Option("--rules", help="Also read the texts by phrases of refusal.")
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(help="Also have a model read the texts: the URL of an OpenAI-compatible API."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="That model's name.")] = None,
    judge_key: Annotated[
        str | None, typer.Option(envvar="RHEOSTAT_JUDGE_KEY", help="The key of that API.")
    ] = None,
    judge_prompt: Annotated[
        Path | None,
        typer.Option(help="A file with another prompt for it; reports show the prompt."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the report there as JSON.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write it as one HTML page.")
    ] = None,
    model_card: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Put it into a model card: Markdown with metadata."),
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Check it against bounds: a YAML list."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Read this report, ask no server."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Compare two reports on the prompts that both have."),
    ] = None,
) -> None:
    """Measure a served checkpoint's decisions and texts.

    Sends each prompt to the server at --url. Without --data and --train-data, the demo's prompts
    are used. A killed run with --out goes on where it was.
    """
    from rich.console import Console

    from training.evaluation.evaluate import Run
    from training.evaluation.evaluate import evaluate as evaluate_server
    from training.evaluation.questions import Questions, set_names
    from training.evaluation.report import ALL, load_report
    from training.judging.model import judge_of
    from training.judging.reading import Readers
    from training.reports import outputs
    from training.serving import exit_on_sigterm

    console = Console()
    if compare is not None:
        outputs.deliver_comparison(*compare, out, console)
        return
    if report is not None:
        read = load_report(report)
        wanted = outputs.prepare(html, model_card, gate, read.sets)
        raise typer.Exit(outputs.deliver(read, wanted, console))
    readers = Readers(rules, judge_of(judge, judge_model, judge_key, judge_prompt))
    exit_on_sigterm()
    with _sources(data, train_data) as (asked, taught):
        questions = Questions(asked, taught, limit, texts, readers, seed)
        sets = [ALL, *set_names(questions.data)]
        wanted = outputs.prepare(html, model_card, gate, sets)
        outputs.make_folder(out)
        run = Run(url, _typed(context), api_key, out)
        measured = evaluate_server(questions, run, Console(stderr=True))
    raise typer.Exit(outputs.deliver(measured, wanted, console))


@contextmanager
def _sources(
    data: list[Path] | None, train_data: Path | None
) -> "Iterator[tuple[tuple[Source, ...], tuple[Source, ...]]]":
    """Yields what is asked and what teaches the reader of texts: the demo's where neither is."""
    from tempfile import TemporaryDirectory

    from training.config.data import named_sources
    from training.demo_data.render import write

    taught = named_sources(train_data) if train_data else ()
    if data:
        yield tuple(source for path in data for source in named_sources(path)), taught
        return
    with TemporaryDirectory() as rendered:
        write(Path(rendered), seed=0)
        demo = named_sources(Path(rendered) / "train.jsonl")
        yield named_sources(Path(rendered) / "evaluation.jsonl"), taught or demo


def _typed(context: typer.Context) -> str:
    """Returns the command as it was typed, without the keys."""
    words = ["rheostat", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            values = value if isinstance(value, list | tuple) else [value]
            shown = ["..."] if parameter.name in ("api_key", "judge_key") else map(str, values)
            words += [word for one in shown for word in (parameter.opts[0], one)]
    return shlex.join(words)
