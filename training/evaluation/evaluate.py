"""`rheostat evaluate`: asks a server each thing once, and computes the report from the answers."""

import asyncio
import random
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.errors import EvaluationError
from models.files import write_atomically
from training.client import RejectedError, RheostatClient, Scores, SolvedRate, client_of
from training.data.sources import draw_rows
from training.evaluation.asking import Asker
from training.evaluation.cache import Cache
from training.evaluation.checks import check
from training.evaluation.compose import Answers, Facts, compose, sample_seed
from training.evaluation.dials import RATES
from training.evaluation.questions import (
    VARIANTS,
    Prompts,
    Questions,
    fingerprint,
    read_prompts,
)
from training.evaluation.report import Report, Texts
from training.evaluation.texts import Grader, ask_texts, grade, read_samples
from training.judging.report import Readings

NO_CALIBRATION = "the server has no calibration: run `rheostat calibrate` and restart it"
NO_GRADER = "no --train-data teaches what refusals and answers look like"
NO_TEXTS = "no texts were generated: --texts 0"


class Run(NamedTuple):
    """Where an evaluation runs.

    Attributes:
        command: As it was typed.
        out: Where the report goes. Answers lie beside it until it is written, so that the same
            command goes on after a kill.
    """

    url: str
    command: str = ""
    api_key: str | None = None
    out: Path | None = None


def evaluate(questions: Questions, run: Run, console: Console) -> Report:
    """Measures a running server, and writes the report.

    Raises:
        ConfigError: A data file is wrong, or names a category that the server does not have.
        EvaluationError: The server does not answer as it should.
    """

    async def measured() -> Report:
        async with client_of(run.url, run.api_key) as client:
            return await evaluate_server(client, questions, run, console)

    return asyncio.run(measured())


async def evaluate_server(
    client: RheostatClient, questions: Questions, run: Run, console: Console
) -> Report:
    """Does what `evaluate` does, with a client that exists already."""
    began = monotonic()
    facts = Facts(
        run.url,
        await client.model(),
        await client.served(),
        await client.policy(),
        await client.calibration(),
    )
    prompts = read_prompts(questions, facts.served.names, console.print)
    if not prompts.rows:
        raise EvaluationError("there are no prompts to measure")
    grader = _grader(questions, facts, console)
    path = None if run.out is None else run.out.with_suffix(".answers.jsonl")
    cache = Cache(path, [facts.served.hashes.model_dump(), facts.policy.told, facts.calibration])
    try:
        with _bars(console) as bars:
            asker = Asker(client, facts.served.names, cache, bars)
            answers = await _answers(asker, client, prompts, facts, questions.seed)
            texts, readings = await _texts(asker, prompts, questions, grader)
        seconds = monotonic() - began
        report = compose(prompts, questions, facts, answers, texts, readings, run.command, seconds)
        if run.out is not None:
            write_atomically(run.out, report.to_json())
    except BaseException:
        cache.close(remove=False)
        raise
    cache.close(remove=True)
    return report


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _grader(questions: Questions, facts: Facts, console: Console) -> Grader | None:
    if not questions.train_data or not questions.texts:
        return None
    from training.measure.judge import Judge

    names, seed = facts.served.names, questions.seed
    return Judge(draw_rows(questions.train_data, names, seed=seed, say=console.print))


async def _answers(
    asker: Asker, client: RheostatClient, prompts: Prompts, facts: Facts, seed: int
) -> Answers:
    rows = prompts.rows
    scores = await asker.scores(rows, "scores")
    variants: dict[str, list[Scores] | str] = {}
    for name, edit in VARIANTS.items():
        try:
            asked = [edit(row, seed) for row in rows]
            variants[name] = await asker.scores(asked, f"scores: {name.replace('_', ' ')}")
        except RejectedError as error:
            variants[name] = error.message
    seeds = [sample_seed(fingerprint(row)) for row in rows]
    enforced = facts.policy.enforce
    return Answers(
        scores,
        variants,
        await _solved(client, facts),
        await check(asker, rows, scores, seeds, enforced=enforced, seed=seed),
    )


async def _solved(client: RheostatClient, facts: Facts) -> dict[str, list[SolvedRate]] | str:
    if facts.calibration is None:
        return NO_CALIBRATION
    names = facts.served.names
    try:
        return {n: [await client.solve(n, rate, names) for rate in RATES] for n in names}
    except RejectedError as error:
        return error.message


async def _texts(
    asker: Asker, prompts: Prompts, questions: Questions, grader: Grader | None
) -> tuple[Texts, Readings]:
    every = range(len(prompts.rows))
    places = random.Random(questions.seed).sample(every, min(questions.texts, len(every)))
    rows = [prompts.rows[place] for place in sorted(places)]
    if grader is None and not questions.readers.needed:  # only known answers can be looked for
        rows = [row for row in rows if row.answer is not None]
    samples = await ask_texts(asker, rows)
    texts = grade(samples, asker.names, grader, NO_GRADER if questions.texts else NO_TEXTS)
    return texts, await read_samples(asker, samples, grader, questions.readers, questions.seed)
