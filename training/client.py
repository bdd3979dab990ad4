"""A client of our own server: what it serves, its margins, its answers."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, NamedTuple

import httpx
from pydantic import ValidationError

from models.errors import EvaluationError
from models.hashes import Hashes
from training.answers import (
    Anything,
    Chat,
    Identified,
    Listed,
    ModelEntry,
    Named,
    Page,
    PolicyPage,
    Score,
    SolvedScore,
)
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
        category: The category that the server refuses the prompt for; None: it answers.
    """

    margins: tuple[float, ...]
    log_normaliser: float
    category: str | None = None


class Reply(NamedTuple):
    """What the server made of a request.

    Attributes:
        category: The category it was refused for; None where it was answered.
        margins: Log-odds of refusing against responding, by category, before any bias.
        biases: By category, as the server applied them.
        replaced_rule: Whether a policy's floors replaced the requested decision rule by `greedy`.
    """

    text: str
    category: str | None
    margins: dict[str, float]
    biases: dict[str, float]
    replaced_rule: bool = False


class Settings(NamedTuple):
    """How a chat request is to be decided and written.

    Attributes:
        dials: By category, such as `always` or `{"bias": 1.5}`; others stay as they are.
        decision: The decision rule; None for the server's.
    """

    dials: Mapping[str, Any] = {}
    decision: str | None = None
    temperature: float = 0.0
    seed: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS


class Policy(NamedTuple):
    """The policy of requests that name none.

    Attributes:
        told: All that the server tells of it.
        biases: By category, of a request without dials.
    """

    name: str
    decision: str
    enforce: bool
    biases: dict[str, float]
    told: Mapping[str, Any]


class SolvedRate(NamedTuple):
    """What the server made of a requested rate.

    Attributes:
        biases: `[k]` of the whole request.
        reachable: Whether the calibration says that the rate can be met.
    """

    biases: tuple[float, ...]
    reachable: bool


class Served(NamedTuple):
    """The checkpoint that a server serves; its categories are in manifest order."""

    names: tuple[str, ...]
    hashes: Hashes


OnScores = Callable[[Sequence[int], Sequence[Scores]], None]


class RejectedError(EvaluationError):
    """The server answered, and with an error.

    Attributes:
        status: Of HTTP.
        place: The input that is wrong, where the server says so.
    """

    def __init__(self, message: str, status: int, place: int | None) -> None:
        super().__init__(message)
        self.status = status
        self.place = place


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
        models = await self._fetch("/v1/models", Listed[ModelEntry], "a list of models")
        if not models.data:
            raise EvaluationError(f"{self._http.base_url}: the server serves no model")
        return models.data[0].id

    async def categories(self) -> list[str]:
        """Returns the category names in manifest order."""
        kind, what = Listed[Named], "a list of refusal categories"
        page = await self._fetch("/v1/refusal/categories", kind, what)
        return [entry.name for entry in page.data]

    async def served(self) -> Served:
        """Returns what checkpoint is served."""
        page = await self._fetch(
            "/v1/refusal/categories?hashes=true",
            Identified,
            "refusal categories and the checkpoint's hashes",
        )
        return Served(tuple(entry.name for entry in page.data), page.hashes)

    async def policy(self) -> Policy:
        """Returns the policy of requests that name none."""
        page = await self._fetch("/v1/refusal/policies", Listed[Anything], "a list of policies")
        try:
            told = page.data[0].model_dump()
            found = PolicyPage.model_validate(told)
        except (IndexError, ValidationError) as error:
            raise self._unlike("a policy with its dials") from error
        biases = {name: entry.default.bias for name, entry in found.categories.items()}
        return Policy(found.name, found.decision, found.enforce, biases, told)

    async def calibration(self) -> Mapping[str, Any] | None:
        """Returns all that the server tells of its default calibration; None: it has none."""
        try:
            page = await self._fetch("/v1/refusal/calibration", Anything, "a calibration")
        except RejectedError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        return page.model_dump()

    async def solve(self, name: str, rate: float, names: Sequence[str]) -> SolvedRate:
        """Returns the biases by which the server refuses a rate of a category's own prompts."""
        body = {
            "model": await self.model(),
            "inputs": [{"messages": [{"role": "user", "content": "Hello"}]}],
            "refusal": {"categories": {name: {"rate": rate}}},
        }
        page = await self._fetch(
            "/v1/refusal/score", SolvedScore, "what it expects of a rate", body
        )
        biases = tuple(page.data[0].decisions[each].bias for each in names)
        return SolvedRate(biases, page.expected.categories[name].reachable)

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
                        "/v1/refusal/score", Listed[Score], "a list of scores", body
                    )
                except RejectedError as error:
                    raise _with_origin(error, [rows[place] for place in places]) from error
            on_scores(places, self._scores(page, names, len(places)))

        await together(one(places) for places in _batches(rows))

    async def ask(self, model: str, prompt: Sequence[Message], settings: Settings) -> Reply:
        """Asks for one answer."""
        refusal = {"categories": dict(settings.dials), "decision": settings.decision}
        body = {
            "model": model,
            "messages": messages_of(prompt),
            "temperature": settings.temperature,
            "seed": settings.seed,
            "max_tokens": settings.max_new_tokens,
            "refusal": {"report": True, **{key: value for key, value in refusal.items() if value}},
        }
        async with self._slots:
            chat = await self._fetch(
                "/v1/chat/completions", Chat, "choices with a refusal_report", body
            )
        message, report = chat.choices[0].message, chat.choices[0].refusal_report
        text = message.refusal if report.refused else message.content
        margins = {name: entry.margin for name, entry in report.decisions.items()}
        biases = {
            name: 0.0 if entry.bias is None else entry.bias
            for name, entry in report.decisions.items()
        }
        category = report.category if report.refused else None
        replaced = report.replaced_decision is not None
        return Reply(text or "", category, margins, biases, replaced)

    def _scores(self, page: Listed[Score], names: Sequence[str], count: int) -> list[Scores]:
        if sorted(entry.index for entry in page.data) != list(range(count)):
            raise self._unlike(f"{count} scores")
        missing = {name for entry in page.data for name in names if name not in entry.decisions}
        if missing:
            raise EvaluationError(
                f"{self._http.base_url}: the server reports no margin for {min(missing)!r}"
            )
        return [
            _scores_of(entry, names) for entry in sorted(page.data, key=lambda entry: entry.index)
        ]

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
        place = INPUT.match(str(details.get("param")))
        raise RejectedError(full, response.status_code, int(place[1]) if place else None)

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


def check_finite(
    places: Sequence[int], scores: Sequence[Scores], rows: Sequence[Row], names: Sequence[str]
) -> None:
    """Raises an EvaluationError where a score is no finite number; it names the row."""
    for place, score in zip(places, scores, strict=True):
        values = (*score.margins, score.log_normaliser)
        for name, value in zip((*names, "the vocabulary"), values, strict=True):
            if not math.isfinite(value):
                raise EvaluationError(
                    f"{rows[place].origin}: the margin of {name!r} is {value}, no finite number: "
                    "the model's weights or its arithmetic are broken (try --dtype float32)"
                )


def _with_origin(error: RejectedError, batch: Sequence[Row]) -> RejectedError:
    """Returns the error with the place of the row that it is about, where that is known."""
    place = 0 if len(batch) == 1 else error.place
    if place is None:
        return error
    return RejectedError(f"{batch[place].origin}: {error.message}", error.status, place)


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


def _scores_of(entry: Score, names: Sequence[str]) -> Scores:
    margins = tuple(_number(entry.decisions[name].margin) for name in names)
    return Scores(margins, _number(entry.log_normaliser), entry.category)


def _number(value: float | None) -> float:
    # JSON has no NaN.
    return math.nan if value is None else value
