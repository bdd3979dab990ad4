"""Reads margins off a running server: one token of work a prompt, many prompts a request."""

import asyncio
import math
import re
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import EvaluationError
from models.hashes import Hashes
from training.data.rows import Message, Row

BATCH = 256
# Of text, in one request: a quarter of what a server reads at most, if its operator says nothing.
BATCH_BYTES = 8 * 2**20
BATCHES_AT_ONCE = 3
TIMEOUT_S = 600
ATTEMPTS = 3
PAUSE_S = 1.0
INPUT = re.compile(r"inputs\.(\d+)")


class Scores(NamedTuple):
    """The decision step of one prompt, before any bias.

    Attributes:
        margins: `[k]` refusal logits minus the respond logit, in manifest order; NaN where the
            server has no number.
        log_normaliser: Log-sum-exp of the whole vocabulary minus the respond logit.
    """

    margins: tuple[float, ...]
    log_normaliser: float


Page = TypeVar("Page", bound="_Foreign")
OnScores = Callable[[Sequence[int], Sequence[Scores]], None]


class _WrongInput(EvaluationError):
    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


class _Foreign(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Decision(_Foreign):
    margin: float | None


class _Entry(_Foreign):
    index: int
    log_normaliser: float | None
    decisions: dict[str, _Decision]

    def scores(self, names: Sequence[str]) -> Scores:
        margins = tuple(_number(self.decisions[name].margin) for name in names)
        return Scores(margins, _number(self.log_normaliser))


class _ScorePage(_Foreign):
    data: tuple[_Entry, ...]


class _Named(_Foreign):
    name: str


class _Categories(_Foreign):
    data: tuple[_Named, ...]
    hashes: Hashes


class _Model(_Foreign):
    id: str


class _Models(_Foreign):
    data: tuple[_Model, ...]


class Served(NamedTuple):
    """The checkpoint that a server serves.

    Attributes:
        names: Its categories in manifest order.
        hashes: What it is.
    """

    names: tuple[str, ...]
    hashes: Hashes


class ScoringClient:
    """A client of one server's `POST /v1/refusal/score`.

    Args:
        client: Its base URL is the server's, without `/v1`.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def served(self) -> Served:
        """Returns what checkpoint is served.

        Raises:
            EvaluationError: The server does not answer, or is no Rheostat server.
        """
        answer = await self._send("GET", "/v1/refusal/categories?hashes=true")
        page = self._parse(_Categories, answer, "refusal categories and the checkpoint's hashes")
        return Served(tuple(entry.name for entry in page.data), page.hashes)

    async def score(self, rows: Sequence[Row], names: Sequence[str], on_scores: OnScores) -> None:
        """Scores prompts, several batches in flight, in whatever order they come back.

        Args:
            rows: Their prompts are scored.
            names: The `k` categories in manifest order.
            on_scores: Called with places and scores of each batch that came back.

        Raises:
            EvaluationError: The server does not answer as it should.
        """
        answer = await self._send("GET", "/v1/models")
        models = self._parse(_Models, answer, "a list of models").data
        if not models:
            raise EvaluationError(f"{self._client.base_url}: the server serves no model")
        slots = asyncio.Semaphore(BATCHES_AT_ONCE)

        async def one(places: Sequence[int]) -> None:
            async with slots:
                inputs = [{"messages": _messages(rows[place].prompt)} for place in places]
                body = {"model": models[0].id, "inputs": inputs}
                try:
                    answer = await self._send("POST", "/v1/refusal/score", body)
                except EvaluationError as error:
                    place = error.place if isinstance(error, _WrongInput) else 0
                    if len(places) > 1 and not isinstance(error, _WrongInput):
                        raise
                    origin = rows[places[place]].origin
                    raise EvaluationError(f"{origin}: {error.message}") from error
            on_scores(places, self._scores(answer, names, len(places)))

        tasks = [asyncio.create_task(one(places)) for places in _batches(rows)]
        try:
            await asyncio.gather(*tasks)
        finally:
            # gather leaves the others running when one fails.
            for pending in tasks:
                pending.cancel()

    def _scores(self, answer: object, names: Sequence[str], count: int) -> list[Scores]:
        entries = self._parse(_ScorePage, answer, "a list of scores").data
        if sorted(entry.index for entry in entries) != list(range(count)):
            raise self._unlike(f"{count} scores")
        missing = {name for entry in entries for name in names if name not in entry.decisions}
        if missing:
            raise EvaluationError(
                f"{self._client.base_url}: the server reports no margin for {min(missing)!r}"
            )
        return [entry.scores(names) for entry in sorted(entries, key=lambda entry: entry.index)]

    async def _send(self, method: str, path: str, body: Any = None) -> object:
        for attempt in range(1, ATTEMPTS + 1):
            last = attempt == ATTEMPTS
            try:
                response = await self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                if last:
                    raise EvaluationError(
                        f"{self._client.base_url}: no server answers there "
                        f"({error or type(error).__name__}); start one with `rheostat serve`"
                    ) from error
            else:
                if response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR or last:
                    return self._content(response)
            await asyncio.sleep(PAUSE_S * attempt)
        raise AssertionError("the last attempt returns or raises")

    def _content(self, response: httpx.Response) -> object:
        try:
            content: Any = response.json()
        except ValueError as error:
            raise self._unlike("JSON") from error
        if response.is_success:
            return content
        told = content.get("error") if isinstance(content, dict) else None
        message = told.get("message") if isinstance(told, dict) else response.reason_phrase
        full = f"{self._client.base_url}: the server answers {response.status_code}: {message}"
        if place := INPUT.match(str(told.get("param") if isinstance(told, dict) else "")):
            raise _WrongInput(full, int(place[1]))
        raise EvaluationError(full)

    def _parse(self, kind: type[Page], content: object, what: str) -> Page:
        try:
            return kind.model_validate(content)
        except ValidationError as error:
            raise self._unlike(what) from error

    def _unlike(self, what: str) -> EvaluationError:
        return EvaluationError(
            f"{self._client.base_url}: the server does not return {what}, so it is no Rheostat "
            "server, or of another version"
        )


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    batch: list[int] = []
    held = 0
    for place, row in enumerate(rows):
        size = sum(len(turn.content.encode()) for turn in row.prompt)
        if batch and (len(batch) == BATCH or held + size > BATCH_BYTES):
            yield batch
            batch, held = [], 0
        batch.append(place)
        held += size
    if batch:
        yield batch


def _messages(turns: Sequence[Message]) -> list[dict[str, Any]]:
    return [_message(turn) for turn in turns]


def _message(turn: Message) -> dict[str, Any]:
    if turn.category is None:
        return {"role": turn.role, "content": turn.content}
    return {"role": turn.role, "refusal": turn.content, "refusal_category": turn.category}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
