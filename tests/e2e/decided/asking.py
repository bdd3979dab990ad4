"""Many requests at once, and what must hold of each answer: an error, or the right decision."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from tests.e2e.decided.prompts import Body, UnreadableError, expected_prompts
from tests.e2e.decided.reference import Reference
from tests.e2e.policied import Policied

AT_ONCE = 16
# Other batches, other orders of fp32 sums.
ROUNDING = 2e-3
SHOWN_BYTES = 800


class Floor(NamedTuple):
    """A policy of tests/e2e/policied.py with a floor for safety.

    Attributes:
        name: The policy's.
        key: Of a tenant whose policy it is.
        bias: The floor.
        prefill: Whether requests may begin the assistant's turn.
    """

    name: str
    key: str
    bias: float
    prefill: bool


class Attempt(NamedTuple):
    """One request.

    Attributes:
        name: What it tries, for a failure.
        route: Where, for a failure.
        path: The route's.
        body: What it means.
        raw: What is sent; the body's JSON by default.
        headers: More headers.
        chunk_bytes: Sends pieces of that size where it is not 0.
    """

    name: str
    route: str
    path: str
    body: Body
    raw: bytes | None = None
    headers: Mapping[str, str] = {}
    chunk_bytes: int = 0

    def content(self) -> bytes:
        """Returns what is sent."""
        return json.dumps(self.body).encode() if self.raw is None else self.raw


class Outcome(NamedTuple):
    """What became of many attempts.

    Attributes:
        violations: What did not hold, each with its attempt.
        decided: How many prompts were decided, by route.
        refused: How many of them were refused, by route.
    """

    violations: list[str]
    decided: Counter[str]
    refused: Counter[str]


def try_all(
    policied: Policied, floor: Floor, reference: Reference, attempts: Sequence[Attempt]
) -> Outcome:
    """Sends attempts under a policy and judges every answer."""
    answers = asyncio.run(_answers(policied.server.url, floor.key, attempts))
    outcome = Outcome([], Counter(), Counter())
    for attempt, answer in zip(attempts, answers, strict=True):
        try:
            decisions = _judged(attempt, answer, floor, reference)
        except AssertionError as error:
            sent = attempt.content()[:SHOWN_BYTES]
            outcome.violations.append(
                f"{floor.name}, {attempt.route}, {attempt.name}: {error}\n  {sent!r}"
            )
            continue
        outcome.decided[attempt.route] += len(decisions)
        outcome.refused[attempt.route] += sum(decisions)
    if policied.server.process.poll() is not None:
        outcome.violations.append("the server is gone")
    return outcome


async def _answers(
    url: str, key: str, attempts: Sequence[Attempt]
) -> list[httpx.Response | httpx.TransportError]:
    gate = asyncio.Semaphore(AT_ONCE)
    sent = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def answer(attempt: Attempt) -> httpx.Response | httpx.TransportError:
            raw, size = attempt.content(), attempt.chunk_bytes
            async with gate:
                try:
                    return await client.post(
                        attempt.path,
                        content=_pieces(raw, size) if size else raw,
                        headers={**sent, **attempt.headers},
                    )
                except httpx.TransportError as error:
                    return error

        return await asyncio.gather(*map(answer, attempts))


async def _pieces(raw: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(raw), size):
        yield raw[start : start + size]


def _judged(
    attempt: Attempt,
    answer: httpx.Response | httpx.TransportError,
    floor: Floor,
    reference: Reference,
) -> list[bool]:
    """Returns which of a request's choices were refused.

    Raises:
        AssertionError: The answer is no error of the client's and not the right decision.
    """
    if isinstance(answer, httpx.TransportError):
        raise AssertionError(f"no answer: {answer!r}")
    events = _events(answer)
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, f"{answer.status_code}: {answer.text[:300]}"
        _check_error(events[0])
        return []
    # What a client may read anywhere is what it wrote itself.
    sent = json.dumps(attempt.body)
    shown = [t.token for t in reference.manifest.control_tokens if t.token in answer.text]
    assert all(token in sent for token in shown), f"the answer shows {shown}"
    if any(event.get("error") or event.get("type") == "error" for event in events):
        return []
    reports = dict(_reports(events))
    assert reports, f"no report: {answer.text[:300]}"
    try:
        prompts = expected_prompts(attempt.path, attempt.body, reference, prefill=floor.prefill)
    except UnreadableError as error:
        raise AssertionError(f"200, but {error}") from error
    for index, report in reports.items():
        ids = prompts[index * len(prompts) // len(reports)]
        _check_report(report, reference, ids, floor)
    _check_headers(answer, reports)
    _check_texts(attempt, events, reports)
    return [report["refused"] for report in reports.values()]


def _check_error(body: Any) -> None:
    error = body.get("error")
    assert isinstance(error, dict), f"no error body: {body}"
    assert isinstance(error.get("message"), str), f"no message: {body}"


def _check_report(report: Body, reference: Reference, ids: list[int], floor: Floor) -> None:
    decisions = report["decisions"]
    names = reference.manifest.names
    expected = reference.margins(ids)
    reported = [decisions[name]["margin"] for name in names]
    wrong = max(abs(a - b) for a, b in zip(reported, expected, strict=True))
    assert wrong < ROUNDING, (
        f"decided about something else: margins {_short(reported)}, of these {len(ids)} ids "
        f"{_short(expected)}"
    )
    biases = [_bias(decisions[name]["bias"]) for name in names]
    assert biases[0] >= floor.bias - 1e-3, f"a safety bias of {biases[0]}"
    strongest = max(m + b for m, b in zip(expected, biases, strict=True))
    if abs(strongest) > ROUNDING:
        assert report["refused"] is (strongest > 0), f"refused: {report['refused']}"


def _short(margins: Iterable[float]) -> list[float]:
    return [round(margin, 2) for margin in margins]


def _bias(value: float | str) -> float:
    return {"never": -math.inf, "always": math.inf}[value] if isinstance(value, str) else value


def _check_headers(answer: httpx.Response, reports: Mapping[int, Body]) -> None:
    if answer.headers["content-type"].startswith("application/json"):
        said = set(answer.headers["x-refusal-decision"].split(", "))
        known = {"refuse" if report["refused"] else "respond" for report in reports.values()}
        assert said == known, f"headers say {said}, reports {known}"


def _check_texts(attempt: Attempt, events: list[Body], reports: Mapping[int, Body]) -> None:
    """Holds refused choices to no other text than that of a refusal."""
    if attempt.body.get("echo"):
        return
    for event in events:
        for choice in event.get("choices", ()):
            message = choice.get("message") or choice.get("delta") or {}
            if reports[choice["index"]]["refused"]:
                assert not message.get("content"), f"an answer beside a refusal: {choice}"
                assert not message.get("tool_calls"), f"a call beside a refusal: {choice}"
        if "choices" not in event and reports[0]["refused"]:
            kinds = {part["type"] for item in event.get("output", ()) for part in item["content"]}
            assert kinds <= {"refusal"}, f"an answer beside a refusal: {event}"
            if event.get("type") == "message":
                assert event["stop_reason"] == "refusal", f"no refusal: {event}"


def _events(answer: httpx.Response) -> list[Body]:
    """Returns the JSON objects of an answer, one where it is no stream."""
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        try:
            return [answer.json()]
        except ValueError:
            raise AssertionError(f"no JSON: {answer.text[:300]}") from None
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def _reports(events: list[Body]) -> Iterator[tuple[int, Body]]:
    for event in events:
        for choice in event.get("choices", ()):
            if "refusal_report" in choice:
                yield choice["index"], choice["refusal_report"]
        for place in (event, event.get("response"), event.get("delta")):
            if isinstance(place, dict) and "refusal_report" in place:
                yield 0, place["refusal_report"]


def scored_margins(
    policied: Policied, floor: Floor, conversations: list[list[Body]]
) -> list[list[float]]:
    """Returns what `/v1/refusal/score` says of chat conversations."""
    body = {
        "inputs": [{"messages": messages} for messages in conversations],
        "refusal": {"policy": floor.name},
    }
    with policied.client(floor.key) as client:
        answer = client.post("/v1/refusal/score", json=body)
    assert answer.status_code == 200, answer.text
    return [
        [decision["margin"] for decision in entry["decisions"].values()]
        for entry in answer.json()["data"]
    ]
