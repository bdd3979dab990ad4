import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.types import Message, Receive, Scope, Send

from models.errors import RequestError, UnavailableError
from server.policies.book import Caller
from server.web.admission import Admission, answers_in
from tests.server.middlewares import CHAT, USER, FakeServer, scope_of, steering_app

ANYBODY = Caller(None, ())
BODY = {"messages": [USER]}


def tenant(name: str, most: int | None) -> Caller:
    return Caller(name, (), most)


@pytest.mark.parametrize(
    ("body", "answers"),
    [
        (BODY, 1),
        ({**BODY, "n": 3}, 3),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": "a", "best_of": 5}, 5),
        ({"messages": [[USER], [USER], [USER]]}, 3),
        ({"input": "a"}, 1),
        ({"inputs": [{"prompt": "a"}] * 3}, 3),
        ({"inputs": [{"prompt": "a"}] * 500}, 16),  # the route's own bound
        ({"n": "x", "messages": 5, "inputs": 5}, 1),  # an error, later
    ],
)
def test_body_counts_as_many_answers_as_it_keeps_the_engine_busy_with(
    body: dict[str, Any], answers: int
) -> None:
    assert answers_in(body) == answers


def test_requests_wait_up_to_the_bound_and_the_next_is_429() -> None:
    admission = Admission(2, 1)
    places = [admission.enter(ANYBODY) for _ in range(3)]
    assert (admission.held, admission.waiting) == (3, 1)
    with pytest.raises(UnavailableError, match="at most 3 may be") as told:
        admission.enter(ANYBODY)
    assert (told.value.status, told.value.code) == (429, "queue_full")
    assert told.value.headers == {"retry-after": "1"}
    admission.check(ANYBODY, generates=False)
    places[0].leave()
    admission.enter(ANYBODY)


def test_three_times_as_many_wait_as_the_engine_works_on_unless_told_otherwise() -> None:
    admission = Admission(4)
    for _ in range(16):
        admission.enter(ANYBODY)
    with pytest.raises(UnavailableError):
        admission.enter(ANYBODY)


def test_request_of_many_answers_counts_as_many() -> None:
    admission = Admission(4, 0)
    place = admission.enter(ANYBODY)
    place.widen(8)
    assert (admission.held, admission.waiting) == (8, 4)
    with pytest.raises(UnavailableError):
        admission.enter(ANYBODY)
    place.leave()
    place.leave()
    assert admission.held == 0


def test_tenant_is_bounded_and_leaves_others_their_places() -> None:
    admission = Admission(100)
    greedy, other = tenant("greedy", 2), tenant("other", 2)
    held = [admission.enter(greedy) for _ in range(2)]
    with pytest.raises(UnavailableError, match="max_running") as told:
        admission.enter(greedy)
    assert (told.value.status, told.value.code) == (429, "tenant_full")
    admission.enter(other).widen(2)
    held[0].leave()
    last = admission.enter(greedy)
    with pytest.raises(UnavailableError):
        last.widen(2)
    last.leave()
    assert admission.held == 3


def test_request_that_its_tenant_could_never_run_is_an_error_of_its_own() -> None:
    place = Admission(100).enter(tenant("a", 2))
    with pytest.raises(RequestError, match="asks for 3 answers") as told:
        place.widen(3)
    assert (told.value.status, told.value.param) == (422, "n")


def test_draining_server_takes_nothing_and_knows_when_it_is_idle() -> None:
    async def drain() -> None:
        admission = Admission(10)
        place = admission.enter(ANYBODY)
        admission.drain()
        for generates in (False, True):
            with pytest.raises(UnavailableError) as told:
                admission.check(ANYBODY, generates=generates)
            assert (told.value.status, told.value.code) == (503, "unavailable")
        idle = asyncio.create_task(admission.idle())
        await asyncio.sleep(0)
        assert not idle.done()
        place.leave()
        await asyncio.wait_for(idle, 10)

    asyncio.run(drain())


# through the middleware


def post(
    server: FakeServer, admission: Admission, content: Any, path: str = CHAT
) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(
            steering_app(server, admission=admission), raise_app_exceptions=False
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"content-type": "application/json"}
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "server",
    [
        FakeServer(),
        FakeServer(status=500),
        FakeServer(error=RuntimeError("fault")),
        FakeServer(parts=(b"data: {}\n\n", b"data: [DONE]\n\n"), media_type="text/event-stream"),
    ],
)
@pytest.mark.parametrize("content", [b'{"messages": [], "n": 3}', b"{", b'{"refusal": 5}'])
def test_place_is_left_however_a_request_ends(server: FakeServer, content: bytes) -> None:
    admission = Admission(1, 0)
    for _ in range(3):
        assert post(server, admission, content).status_code != 429
        assert admission.held == 0


@pytest.mark.parametrize("after", [0, 1])
def test_client_that_goes_leaves_its_place_and_counts_as_gone(after: int) -> None:
    """It goes before its answer begins, or within."""
    admission = Admission(5)
    asked = iter([{"type": "http.request", "body": b'{"messages": []}'}])

    async def receive() -> Message:
        return next(asked, {"type": "http.disconnect"})

    async def send(_: Message) -> None:
        pass

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        parts = [{"type": "http.response.start", "status": 200, "headers": []}]
        for part in parts[:after]:
            await send(part)
        assert admission.held == 1
        assert (await receive())["type"] == "http.disconnect"

    before = requests(499)
    asyncio.run(steering_app(inside, admission=admission)(scope_of(CHAT), receive, send))
    assert (admission.held, requests(499) - before) == (0, 1)


def requests(status: int) -> float:
    labels = {"model_name": "", "route": CHAT, "status": str(status)}
    return REGISTRY.get_sample_value("rheostat_requests_total", labels) or 0.0


def test_full_server_reads_no_body_and_says_when_to_come_again() -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"{"

    server = FakeServer()
    answer = post(server, Admission(0, 0), body())
    assert (answer.status_code, answer.headers["retry-after"], server.calls) == (429, "1", 0)
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.json()["error"]["code"] == "queue_full"
    assert read == 0


@pytest.mark.parametrize("path", [CHAT, "/v1/messages/count_tokens", "/v1/messages"])
def test_draining_server_answers_in_the_shape_of_each_api(path: str) -> None:
    admission = Admission(5)
    admission.drain()
    answer = post(FakeServer(), admission, b"{}", path)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["connection"] == "close"
    assert "the server is ending" in answer.json()["error"]["message"]


def test_route_without_work_for_the_engine_is_served_by_a_full_server() -> None:
    assert (
        post(FakeServer(), Admission(0, 0), b"{}", "/v1/messages/count_tokens").status_code == 200
    )


def shown(name: str) -> float | None:
    return REGISTRY.get_sample_value(f"rheostat_{name}", {"model_name": ""})


def test_metrics_show_what_is_under_way_and_what_waits() -> None:
    admission = Admission(2, 1)
    assert (shown("answers_limit"), shown("draining")) == (3, 0)
    places = [admission.enter(ANYBODY) for _ in range(3)]
    assert (shown("answers_under_way"), shown("answers_waiting")) == (3, 1)
    for place in places:
        place.leave()
    assert (shown("answers_under_way"), shown("answers_waiting")) == (0, 0)
    admission.drain()
    assert shown("draining") == 1
