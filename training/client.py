"""Asks a running Rheostat server, and measures it."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.progress import Progress

from models.errors import EvaluationError
from training.data.encoding import Message, Row, read_rows
from training.measure.report import ANSWER, Outcomes, Report, measure

REQUESTS_AT_ONCE = 64
MAX_NEW_TOKENS = 48

Dials = Mapping[str, str]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str


class _Categories(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    data: tuple[_Entry, ...]


class _Decision(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    margin: float


class _RefusalReport(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    refused: bool
    category: str | None
    decisions: dict[str, _Decision]


class Reply(NamedTuple):
    """What the server made of a request.

    Attributes:
        text: The refusal or the answer.
        category: The category it was refused for; None where it was answered.
        margins: Log-odds of refusing against responding, by category, before any bias.
    """

    text: str
    category: str | None
    margins: dict[str, float]


class RheostatClient:
    """A client of one model on one server.

    Args:
        client: Where the server is and who asks; its base URL ends in `/v1`.
    """

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client
        self._slots = asyncio.Semaphore(REQUESTS_AT_ONCE)

    async def model(self) -> str:
        """Returns the name of the served model.

        Raises:
            EvaluationError: The server does not answer or serves nothing.
        """
        try:
            page = await self._client.models.list()
        except openai.OpenAIError as error:
            raise self._failure(error) from error
        if not page.data:
            raise EvaluationError(f"{self._client.base_url}: the server serves no model")
        return page.data[0].id

    async def categories(self) -> list[str]:
        """Returns the category names in manifest order.

        Raises:
            EvaluationError: The server does not answer, or is not one of ours.
        """
        try:
            body = await self._client.get("/refusal/categories", cast_to=object)
            return [entry.name for entry in _Categories.model_validate(body).data]
        except openai.OpenAIError as error:
            raise self._failure(error) from error
        except ValidationError as error:
            raise self._foreign("a list of refusal categories") from error

    async def ask(self, model: str, prompt: Sequence[Message], dials: Dials) -> Reply:
        """Asks for the most likely answer.

        Args:
            model: The name of the served model.
            prompt: The turns up to the one asked for.
            dials: What the request asks for by category, such as `always`; others stay as they are.

        Raises:
            EvaluationError: The server does not answer, refuses the request, or reports nothing.
        """
        refusal = {"report": True, **({"categories": dict(dials)} if dials else {})}
        async with self._slots:
            try:
                answer = await self._client.chat.completions.create(
                    model=model,
                    messages=[_as_param(message) for message in prompt],
                    temperature=0,
                    max_tokens=MAX_NEW_TOKENS,
                    extra_body={"refusal": refusal},
                )
            except openai.OpenAIError as error:
                raise self._failure(error) from error
        choice = answer.choices[0]
        try:
            report = _RefusalReport.model_validate((choice.model_extra or {}).get("refusal_report"))
        except ValidationError as error:
            raise self._foreign("a refusal_report") from error
        text = choice.message.refusal if report.refused else choice.message.content
        margins = {name: decision.margin for name, decision in report.decisions.items()}
        return Reply(text or "", report.category if report.refused else None, margins)

    def _failure(self, error: openai.OpenAIError) -> EvaluationError:
        where = self._client.base_url
        if isinstance(error, openai.APIStatusError):
            return EvaluationError(
                f"{where}: the server answers {error.status_code}: {error.message}"
            )
        return EvaluationError(
            f"{where}: no server answers there ({error}); start one with `rheostat serve`"
        )

    def _foreign(self, what: str) -> EvaluationError:
        return EvaluationError(
            f"{self._client.base_url}: the server does not return {what}, so it is no Rheostat "
            "server, or of another version"
        )


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


def evaluate(
    url: str,
    data: Path,
    *,
    train_data: Path,
    limit: int | None,
    seed: int,
    progress: bool,
    api_key: str = "none",
) -> Report:
    """Measures a running server.

    Each row is asked twice: as it is, and forced against the decision that the model made.

    Args:
        url: Where the server is, without `/v1`.
        data: The rows to ask.
        train_data: The rows that the model was trained on; they teach what a refusal of each
            category looks like.
        limit: How many rows are drawn; None for all.
        seed: Seed of that draw.
        progress: Whether to show a progress bar.
        api_key: For servers that want one.

    Raises:
        ConfigError: A data file is wrong, or names a category that the server does not have.
        EvaluationError: The server does not answer as it should.
    """

    async def run() -> Report:
        base_url = f"{url.rstrip('/')}/v1"
        async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            return await evaluate_server(
                RheostatClient(client),
                data,
                train_data=train_data,
                limit=limit,
                seed=seed,
                progress=progress,
            )

    return asyncio.run(run())


async def evaluate_server(
    server: RheostatClient,
    data: Path,
    *,
    train_data: Path,
    limit: int | None,
    seed: int,
    progress: bool,
) -> Report:
    """Does what `evaluate` does, with a client that exists already."""
    from training.measure.judge import Judge

    categories = await server.categories()
    rows = _drawn(read_rows(data, categories), limit, seed)
    training_rows = read_rows(train_data, categories)
    samples = await _ask_all(server, rows, categories, progress=progress)
    judge = Judge(training_rows)
    judged = judge.kinds([sample.own.text for sample in samples])
    forced_judged = judge.kinds([sample.flipped.text for sample in samples])
    outcomes = Outcomes(
        categories=categories,
        margins=np.array([[s.own.margins[name] for name in categories] for s in samples]),
        truth=[row.category for row in rows],
        decided=[sample.own.category for sample in samples],
        judged=judged,
        texts=[sample.own.text for sample in samples],
        answers=[row.answer for row in rows],
        forced=[sample.forced for sample in samples],
        forced_judged=forced_judged,
    )
    return measure(outcomes, judge.accuracy)


def force(category: str, categories: Sequence[str]) -> dict[str, str]:
    """Returns the dials that force a decision.

    Args:
        category: What to refuse for, or `answer` to respond.
        categories: All category names.
    """
    return {name: "always" if name == category else "never" for name in categories}


def _drawn(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    return random.Random(seed).sample(rows, limit)


async def _ask_all(
    server: RheostatClient, rows: Sequence[Row], categories: Sequence[str], *, progress: bool
) -> list[Sample]:
    model = await server.model()
    with Progress(disable=not progress) as bar:
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

        tasks = [
            asyncio.create_task(sample(row, categories[number % len(categories)]))
            for number, row in enumerate(rows)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # gather leaves the others running when one fails.
            for pending in tasks:
                pending.cancel()


def _as_param(message: Message) -> ChatCompletionMessageParam:
    content: Any = {"role": message.role, "content": message.content}
    if message.category is not None:
        content = {"role": message.role, "refusal": message.content}
    param: ChatCompletionMessageParam = content
    return param
