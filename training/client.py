"""A client of our own server: what it serves, its margins, its answers."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import EvaluationError
from models.hashes import Hashes
from training.data.rows import Message, Row

BATCH = 256
# Of text, in one request: a quarter of what a server reads at most, if its operator says nothing.
BATCH_BYTES = 8 * 2**20
BATCHES_AT_ONCE = 3
ANSWERS_AT_ONCE = 64
MAX_NEW_TOKENS = 48
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


class Reply(NamedTuple):
    """What the server made of a request.

    Attributes:
        category: The category it was refused for; None where it was answered.
        margins: Log-odds of refusing against responding, by category, before any bias.
    """

    text: str
    category: str | None
    margins: dict[str, float]


class Served(NamedTuple):
    """The checkpoint that a server serves; its categories are in manifest order."""

    names: tuple[str, ...]
    hashes: Hashes


Dials = Mapping[str, str]
OnScores = Callable[[Sequence[int], Sequence[Scores]], None]


class _WrongInputError(EvaluationError):
    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


class _Foreign(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Named(_Foreign):
    name: str


class _Model(_Foreign):
    id: str


class _Margin(_Foreign):
    margin: float | None


class _Score(_Foreign):
    index: int
    log_normaliser: float | None
    decisions: dict[str, _Margin]

    def scores(self, names: Sequence[str]) -> Scores:
        return Scores(
            tuple(_number(self.decisions[name].margin) for name in names),
            _number(self.log_normaliser),
        )


class _Decision(_Foreign):
    margin: float


class _RefusalReport(_Foreign):
    refused: bool
    category: str | None
    decisions: dict[str, _Decision]


class _Said(_Foreign):
    content: str | None = None
    refusal: str | None = None


class _Choice(_Foreign):
    message: _Said
    refusal_report: _RefusalReport


class _Chat(_Foreign):
    choices: Annotated[tuple[_Choice, ...], Field(min_length=1)]


Entry = TypeVar("Entry", bound=_Foreign)
Page = TypeVar("Page", bound=_Foreign)


class _List(_Foreign, Generic[Entry]):
    data: tuple[Entry, ...]


class _Identified(_List[_Named]):
    hashes: Hashes


class RheostatClient:
    """A client of one server.

    Args:
        http: Its base URL is the server's, without `/v1`.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._slots = asyncio.Semaphore(ANSWERS_AT_ONCE)

    async def model(self) -> str:
        """Returns the name of the served model."""
        models = await self._fetch("/v1/models", _List[_Model], "a list of models")
        if not models.data:
            raise EvaluationError(f"{self._http.base_url}: the server serves no model")
        return models.data[0].id

    async def categories(self) -> list[str]:
        """Returns the category names in manifest order."""
        kind, what = _List[_Named], "a list of refusal categories"
        page = await self._fetch("/v1/refusal/categories", kind, what)
        return [entry.name for entry in page.data]

    async def served(self) -> Served:
        """Returns what checkpoint is served."""
        page = await self._fetch(
            "/v1/refusal/categories?hashes=true",
            _Identified,
            "refusal categories and the checkpoint's hashes",
        )
        return Served(tuple(entry.name for entry in page.data), page.hashes)

    async def score(self, rows: Sequence[Row], names: Sequence[str], on_scores: OnScores) -> None:
        """Scores prompts, several batches in flight, in whatever order they come back.

        Args:
            names: The `k` categories in manifest order.
            on_scores: Called with places and scores of each batch that came back.
        """
        model = await self.model()
        slots = asyncio.Semaphore(BATCHES_AT_ONCE)

        async def one(places: Sequence[int]) -> None:
            inputs = [{"messages": messages_of(rows[place].prompt)} for place in places]
            body = {"model": model, "inputs": inputs}
            async with slots:
                try:
                    page = await self._fetch(
                        "/v1/refusal/score", _List[_Score], "a list of scores", body
                    )
                except EvaluationError as error:
                    raise _with_origin(error, [rows[place] for place in places]) from error
            on_scores(places, self._scores(page, names, len(places)))

        await together(one(places) for places in _batches(rows))

    async def ask(self, model: str, prompt: Sequence[Message], dials: Dials) -> Reply:
        """Asks for the most likely answer.

        Args:
            dials: What the request asks for by category, such as `always`; others stay as they are.
        """
        body = {
            "model": model,
            "messages": messages_of(prompt),
            "temperature": 0,
            "max_tokens": MAX_NEW_TOKENS,
            "refusal": {"report": True, **({"categories": dict(dials)} if dials else {})},
        }
        async with self._slots:
            chat = await self._fetch(
                "/v1/chat/completions", _Chat, "choices with a refusal_report", body
            )
        message, report = chat.choices[0].message, chat.choices[0].refusal_report
        text = message.refusal if report.refused else message.content
        margins = {name: entry.margin for name, entry in report.decisions.items()}
        return Reply(text or "", report.category if report.refused else None, margins)

    def _scores(self, page: _List[_Score], names: Sequence[str], count: int) -> list[Scores]:
        if sorted(entry.index for entry in page.data) != list(range(count)):
            raise self._unlike(f"{count} scores")
        missing = {name for entry in page.data for name in names if name not in entry.decisions}
        if missing:
            raise EvaluationError(
                f"{self._http.base_url}: the server reports no margin for {min(missing)!r}"
            )
        return [entry.scores(names) for entry in sorted(page.data, key=lambda entry: entry.index)]

    async def _fetch(self, path: str, kind: type[Page], what: str, body: Any = None) -> Page:
        """Returns the answer to a GET, or with a body to a POST; `what` says what it should be."""
        content = await self._send("GET" if body is None else "POST", path, body)
        try:
            return kind.model_validate(content)
        except ValidationError as error:
            raise self._unlike(what) from error

    async def _send(self, method: str, path: str, body: Any) -> object:
        for attempt in range(1, ATTEMPTS + 1):
            last = attempt == ATTEMPTS
            try:
                response = await self._http.request(method, path, json=body)
            except httpx.HTTPError as error:
                if last:
                    raise EvaluationError(
                        f"{self._http.base_url}: no server answers there "
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
        found = content.get("error") if isinstance(content, dict) else None
        details: dict[str, Any] = found if isinstance(found, dict) else {}
        message = details.get("message", response.reason_phrase)
        full = f"{self._http.base_url}: the server answers {response.status_code}: {message}"
        if place := INPUT.match(str(details.get("param"))):
            raise _WrongInputError(full, int(place[1]))
        raise EvaluationError(full)

    def _unlike(self, what: str) -> EvaluationError:
        return EvaluationError(
            f"{self._http.base_url}: the server does not return {what}, so it is no Rheostat "
            "server, or of another version"
        )


@asynccontextmanager
async def client_of(url: str, api_key: str | None = None) -> AsyncIterator[RheostatClient]:
    """Opens a client.

    Args:
        url: Where the server is, with or without `/v1`.
    """
    base = url.rstrip("/").removesuffix("/v1")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=TIMEOUT_S) as http:
        yield RheostatClient(http)


async def together(work: Iterator[Any]) -> list[Any]:
    """Awaits coroutines at once and returns their results in order; cancels all if one fails."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        # gather leaves the others running when one fails.
        for pending in tasks:
            pending.cancel()


def messages_of(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns turns as the server reads them; an earlier refusal carries its category."""
    return [
        {"role": turn.role, "content": turn.content}
        if turn.category is None
        else {"role": turn.role, "refusal": turn.content, "refusal_category": turn.category}
        for turn in turns
    ]


def _with_origin(error: EvaluationError, batch: Sequence[Row]) -> EvaluationError:
    """Returns the error with the place of the row that it is about, where that is known."""
    if isinstance(error, _WrongInputError):
        return EvaluationError(f"{batch[error.place].origin}: {error.message}")
    return EvaluationError(f"{batch[0].origin}: {error.message}") if len(batch) == 1 else error


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


def _number(value: float | None) -> float:
    # JSON has no NaN.
    return math.nan if value is None else value
