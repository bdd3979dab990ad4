"""`rheostat evaluate`: how a served checkpoint decides, and whether its texts follow the token."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from models.errors import EvaluationError
from training.client import Dials, Reply, RheostatClient, client_of, together
from training.config.data import Source
from training.data.rows import Message, Row
from training.data.sources import draw_rows
from training.measure.report import ANSWER, Outcome, Report, measure


class Questions(NamedTuple):
    """What is asked.

    Attributes:
        train_data: The rows that the model was trained on; they teach what a refusal of each
            category looks like.
        limit: How many rows are drawn; None for all.
    """

    data: tuple[Source, ...]
    train_data: tuple[Source, ...]
    limit: int | None = None
    seed: int = 0


class Sample(NamedTuple):
    """What a row led to.

    Attributes:
        own: The reply of the model left to itself.
        forced: What it was then forced to: a category or `answer`.
        flipped: The reply to that.
    """

    own: Reply
    forced: str
    flipped: Reply


def evaluate(url: str, questions: Questions, console: Console) -> Report:
    """Measures a running server.

    Each row is asked twice: as it is, and forced against the decision that the model made.

    Raises:
        ConfigError: A data file is wrong, or names a category that the server does not have.
        EvaluationError: The server does not answer as it should.
    """

    async def run() -> Report:
        async with client_of(url) as client:
            return await evaluate_server(client, questions, console)

    return asyncio.run(run())


async def evaluate_server(server: RheostatClient, questions: Questions, console: Console) -> Report:
    """Does what `evaluate` does, with a client that exists already."""
    from training.measure.judge import Judge

    categories = await server.categories()
    rows = draw_rows(
        questions.data, categories, limit=questions.limit, seed=questions.seed, say=console.print
    )
    taught = draw_rows(questions.train_data, categories, seed=questions.seed, say=console.print)
    samples = await _ask_all(server, rows, categories, console)
    judge = Judge(taught)
    judged = judge.kinds([sample.own.text for sample in samples])
    flipped = judge.kinds([sample.flipped.text for sample in samples])
    outcomes = [
        Outcome(
            truth=row.category,
            answer=row.answer,
            margins=[sample.own.margins[name] for name in categories],
            decided=sample.own.category,
            text=sample.own.text,
            judged=kind,
            forced=sample.forced,
            forced_judged=forced_kind,
        )
        for row, sample, kind, forced_kind in zip(rows, samples, judged, flipped, strict=True)
    ]
    return measure(categories, outcomes, judge.accuracy)


def force(category: str, categories: Sequence[str]) -> dict[str, str]:
    """Returns the dials that force a decision."""
    return {name: "always" if name == category else "never" for name in categories}


async def _ask_all(
    server: RheostatClient, rows: Sequence[Row], categories: Sequence[str], console: Console
) -> list[Sample]:
    model = await server.model()
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("asking", total=2 * len(rows))

        async def ask(prompt: Sequence[Message], dials: Dials) -> Reply:
            reply = await server.ask(model, prompt, dials)
            if missing := set(categories) - set(reply.margins):
                raise EvaluationError(f"the server reports no margin for {min(missing)!r}")
            bar.advance(task)
            return reply

        async def sample(row: Row, against: str) -> Sample:
            own = await ask(row.prompt, {})
            forced = against if own.category is None else ANSWER
            return Sample(own, forced, await ask(row.prompt, force(forced, categories)))

        return await together(
            sample(row, categories[number % len(categories)]) for number, row in enumerate(rows)
        )
