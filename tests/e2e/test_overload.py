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
    requests_metric,
    under_way,
)

# The engine of a CPU works on so many at once, and three times as many may wait.
MOST_CHOICES = 128
ROUNDS = 4
TOKENS = 150
ALWAYS_ANSWER = ("/healthz", "/livez", "/startupz", "/readyz", "/health", "/metrics", "/version")
REFUSED = requests_metric(CHAT, 429)
GIVEN = requests_metric(CHAT, 200)


def test_full_server_turns_new_requests_away_and_answers_what_it_took(server: Server) -> None:
    before = [server.metric(name) for name in (GIVEN, REFUSED)]

    async def fill() -> tuple[Counter[str], Counter[str], list[httpx.Response]]:
        async with http_of(server) as client:
            wide = [long_chat(TOKENS, n=MOST_CHOICES, stream=i % 2 == 0) for i in range(16)]
            filling = asyncio.create_task(outcomes_of(client, wide))
            await under_way(server, ROUNDS * MOST_CHOICES)
            late = await outcomes_of(client, [long_chat(1)] * 40)
            # Its body would take long to come, and is not waited for.
            large = client.post(CHAT, content=b"{" + b" " * 3_000_000)
            probes = [client.get(path, headers=OPERATOR) for path in ALWAYS_ANSWER]
            answers = await asyncio.gather(large, *probes)
            return await filling, late, answers

    took, late, (large, *probes) = asyncio.run(fill())
    assert [probe.status_code for probe in probes] == [200] * len(ALWAYS_ANSWER)
    error = large.json()["error"]
    assert (large.status_code, large.headers["retry-after"]) == (429, "1")
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert took[ANSWERED] + took[TURNED_AWAY] == 16
    assert took[ANSWERED] >= ROUNDS
    assert late == {TURNED_AWAY: 40}
    given, refused = (
        server.metric(name) - was for name, was in zip((GIVEN, REFUSED), before, strict=True)
    )
    assert (given, refused) == (took[ANSWERED], took[TURNED_AWAY] + 41)
    assert in_engine(server) == 0
    assert server.http.post(CHAT, json=long_chat(1)).status_code == 200


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
