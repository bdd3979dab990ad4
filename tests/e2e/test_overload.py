"""A full server says so at once, and one tenant's requests leave others their places."""

import asyncio
from collections import Counter
from typing import Any

import httpx

from tests.e2e.policied import ACME, CROWD, CROWDS_MOST, Policied
from tests.e2e.servers import OPERATOR, Server
from tests.e2e.traffic import (
    ANSWERED,
    CHAT,
    TURNED_AWAY,
    http_of,
    in_engine,
    long_chat,
    outcome_of,
    outcomes_of,
    under_way,
)

MOST_CHOICES = 128
TOKENS = 24
ALWAYS_ANSWER = ("/healthz", "/livez", "/startupz", "/readyz", "/health", "/metrics", "/version")
REFUSED = 'rheostat_requests_total{route="/v1/chat/completions",status="429"}'
GIVEN = 'rheostat_requests_total{route="/v1/chat/completions",status="200"}'


def test_full_server_turns_new_requests_away_and_answers_what_it_took(server: Server) -> None:
    before = [server.metric(name) for name in (GIVEN, REFUSED)]

    async def fill() -> tuple[Counter[str], Counter[str], list[int]]:
        async with http_of(server) as client:
            # One body each: they come one after the other, and the last of them find it full.
            wide = [long_chat(TOKENS, n=MOST_CHOICES, stream=i % 2 == 0) for i in range(16)]
            filling = asyncio.create_task(outcomes_of(client, wide))
            await under_way(server, 2 * MOST_CHOICES)
            probes = [client.get(path, headers=OPERATOR) for path in ALWAYS_ANSWER]
            statuses = [answer.status_code for answer in await asyncio.gather(*probes)]
            late = await outcomes_of(client, [long_chat(1)] * 40)
            return await filling, late, statuses

    took, late, statuses = asyncio.run(fill())
    assert statuses == [200] * len(ALWAYS_ANSWER)
    assert took[ANSWERED] + took[TURNED_AWAY] == 16
    assert took[ANSWERED] >= 2
    assert late == {TURNED_AWAY: 40}
    given, refused = (
        server.metric(name) - was for name, was in zip((GIVEN, REFUSED), before, strict=True)
    )
    assert (given, refused) == (took[ANSWERED], took[TURNED_AWAY] + 40)
    assert in_engine(server) == 0
    assert server.http.post(CHAT, json=long_chat(1)).status_code == 200


def test_body_of_a_full_servers_client_is_not_read(server: Server) -> None:
    async def fill() -> httpx.Response:
        async with http_of(server) as client:
            wide = [long_chat(TOKENS, n=MOST_CHOICES)] * 8
            filling = asyncio.create_task(outcomes_of(client, wide))
            await under_way(server, 2 * MOST_CHOICES)
            answer = await client.post(CHAT, content=b"{" + b" " * 3_000_000)
            await filling
            return answer

    answer = asyncio.run(fill())
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")


def test_tenant_with_enough_under_way_waits_and_others_do_not(policied: Policied) -> None:
    def body(**fields: Any) -> dict[str, Any]:
        return {**long_chat(300, **fields), "refusal": {}}

    async def crowd() -> tuple[Counter[str], list[str], httpx.Response]:
        server = policied.server
        crowds, acmes = f"Bearer {CROWD}", f"Bearer {ACME}"
        async with (
            http_of(server, authorization=crowds) as client,
            http_of(server, authorization=acmes, **{"x-refusal-policy": "lab"}) as other,
        ):
            held = asyncio.create_task(outcomes_of(client, [body(n=CROWDS_MOST)]))
            await under_way(server, CROWDS_MOST)
            many = [*[body()] * 20, *[body(stream=True)] * 20]
            asked = [*(outcome_of(client, one) for one in many), outcome_of(other, body())]
            outcomes = await asyncio.gather(*asked)
            too_wide = await client.post(CHAT, json=body(n=CROWDS_MOST + 1))
            assert await held == {ANSWERED: 1}
            again = await outcomes_of(client, [body()] * CROWDS_MOST)
            assert again == {ANSWERED: CROWDS_MOST}
            return Counter(outcomes[:-1]), outcomes[-1:], too_wide

    crowds, others, too_wide = asyncio.run(crowd())
    assert crowds == {TURNED_AWAY: 40}
    assert others == [ANSWERED]
    assert too_wide.status_code in (422, 429)
