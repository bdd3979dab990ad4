"""Who the gateway says is calling, how often a caller may, and what happens when a server dies."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.gateway import TENANTS, UNLIMITED, Gateway, free_port, nginx
from tests.docker.upstreams import BREAKS, READS_NOTHING, Upstream, upstreams

SHOP_KEY, OTHER_KEY = "key-of-the-shop-0123456789", "key-of-another-0123456789"
SECRET = "the-gateways-secret-0123456789"
KNOWN = (
    TENANTS.read_text()
    .replace('# "the key of shop" shop;', f'"{SHOP_KEY}" shop;')
    .replace('"" "";\n    default "";', f'"" "";\n    default "{SECRET}";')
)
FORGED = {"X-Tenant": "acme", "x-gateway-secret": SECRET, "X_Tenant": "acme"}
SLOW = "rate=1r/m"


class Pair:
    """A gateway before two servers."""

    def __init__(self, gateway: Gateway, servers: list[Upstream]) -> None:
        self.gateway = gateway
        self.servers = servers

    def seen(self, path: str) -> int:
        return sum(one == path for server in self.servers for _, one in server.seen)

    def headers_of(self, sent: dict[str, str]) -> dict[str, str]:
        for server in self.servers:
            server.headers = None
        assert self.gateway.send("GET", "/v1/models", headers=sent).status == 200
        (headers,) = [server.headers for server in self.servers if server.headers is not None]
        assert len(headers) == len(set(headers))
        return {name.lower(): value for name, value in headers.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    prefix = tmp_path_factory.mktemp("nginx")
    with (
        upstreams("one", "two") as servers,
        nginx(prefix, [server.port for server in servers], tenants=KNOWN) as running,
    ):
        yield Pair(running, servers)


def test_both_servers_are_asked(pair: Pair) -> None:
    answers = Counter(pair.gateway.send("GET", "/v1/models").read() for _ in range(20))
    assert answers == {b'{"from":"one"}': 10, b'{"from":"two"}': 10}


def test_tenant_of_a_key_is_named_with_the_gateways_secret(pair: Pair) -> None:
    for sent in ({"Authorization": f"bearer  {SHOP_KEY}"}, {"x-api-key": SHOP_KEY}):
        headers = pair.headers_of(sent)
        assert (headers["x-tenant"], headers["x-gateway-secret"]) == ("shop", SECRET)


@pytest.mark.parametrize("key", [{}, {"Authorization": f"Bearer {OTHER_KEY}"}])
def test_callers_whom_the_gateway_does_not_know_name_no_tenant(
    pair: Pair, key: dict[str, str]
) -> None:
    headers = pair.headers_of({**FORGED, **key})
    assert [name for name in headers if "tenant" in name or "secret" in name] == []
    assert headers.get("authorization") == key.get("Authorization")


def test_tenant_that_a_known_caller_names_is_replaced(pair: Pair) -> None:
    headers = pair.headers_of({**FORGED, "Authorization": f"Bearer {SHOP_KEY}"})
    assert headers["x-tenant"] == "shop"


def test_servers_get_one_key_and_it_is_the_counted_one(pair: Pair) -> None:
    headers = pair.headers_of({"Authorization": f"Bearer {SHOP_KEY}", "x-api-key": OTHER_KEY})
    assert headers["authorization"] == f"Bearer {SHOP_KEY}"
    assert "x-api-key" not in headers
    joined = pair.headers_of({"x-api-key": f"{SHOP_KEY}, {OTHER_KEY}"})
    assert "authorization" not in joined


def test_shipped_file_names_nobody(tmp_path: Path) -> None:
    with upstreams("one") as servers, nginx(tmp_path, [servers[0].port]) as running:
        headers = Pair(running, servers).headers_of({"Authorization": f"Bearer {SHOP_KEY}"})
        assert headers["authorization"] == f"Bearer {SHOP_KEY}"
        assert "x-tenant" not in headers
        assert "x-gateway-secret" not in headers


def statuses(gateway: Gateway, count: int, headers: list[dict[str, str]]) -> Counter[int]:
    connection = gateway.connection()
    counts: Counter[int] = Counter()
    for place in range(count):
        connection.request("GET", "/v1/models", headers=headers[place % len(headers)])
        answer = connection.getresponse()
        answer.read()
        counts[answer.status] += 1
    return counts


def test_key_is_limited_wherever_it_stands_and_others_are_not(tmp_path: Path) -> None:
    forms = [
        {"Authorization": f"Bearer {SHOP_KEY}"},
        {"Authorization": f"bearer   {SHOP_KEY}"},
        {"x-api-key": SHOP_KEY},
    ]
    with (
        upstreams("one") as (server,),
        nginx(tmp_path, [server.port], (SLOW, UNLIMITED)) as running,
    ):
        # The burst, and the one that the rate allows.
        assert statuses(running, 60, forms) == {200: 41, 429: 19}
        assert len(server.seen) == 41
        answer = running.send("GET", "/v1/models", headers=forms[0])
        assert (answer.status, answer.getheader("retry-after")) == (429, "1")
        assert b'"code":"rate_limit_exceeded"' in answer.read()
        assert statuses(running, 5, [{"x-api-key": OTHER_KEY}]) == {200: 5}


def test_address_is_limited_however_many_keys_it_tries(tmp_path: Path) -> None:
    keys = [{"x-api-key": f"guess-{number}"} for number in range(1000)]
    with (
        upstreams("one") as (server,),
        nginx(tmp_path, [server.port], (UNLIMITED, SLOW)) as running,
    ):
        assert statuses(running, 220, keys) == {200: 201, 429: 19}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_server_that_is_gone_costs_no_request(tmp_path: Path, method: str) -> None:
    body = b"{}" if method == "POST" else None
    with (
        upstreams("one") as (server,),
        nginx(tmp_path, [free_port(), server.port]) as running,
    ):
        for _ in range(10):
            assert running.send(method, "/v1/completions", body).status == 200
        assert server.seen == [(method, "/v1/completions")] * 10


@pytest.mark.parametrize("path", [BREAKS, READS_NOTHING])
def test_post_is_never_sent_twice(pair: Pair, path: str) -> None:
    before = pair.seen(path)
    answer = pair.gateway.send("POST", path, b"{}")
    assert answer.status == 502
    assert b'"code":"service_error"' in answer.read()
    assert pair.seen(path) == before + 1
