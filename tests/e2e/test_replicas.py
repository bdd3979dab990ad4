"""Two servers behind the gateway, under load: policies change, and one server dies."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from server.policies.credentials import generate_key, hash_key
from tests.docker.gateway import Gateway, nginx
from tests.e2e.servers import Server, rheostat_server

pytestmark = pytest.mark.long

KEY = generate_key()
CLIENTS = 12
BROKEN = 0
LIMIT_S = 60


def policies(version: int) -> str:
    """Returns a policy file whose floor and text both name its version."""
    return f"""\
policies:
  desk:
    floors: {{safety: {{bias: {60 + version}}}}}
    refusal_text: {{safety: version {version}}}
    report: true
  lab: {{}}
tenants:
  acme:
    policies: [desk, lab]
    keys: ["{hash_key(KEY)}"]
"""


class Outcome(NamedTuple):
    """What became of a request.

    Attributes:
        began: When it was sent, by the monotonic clock.
        ended: When its answer was complete, or broke off.
        status: Of the answer; BROKEN where it broke off.
        version: Floor and text of the policy that decided it.
    """

    began: float
    ended: float
    status: int
    version: tuple[float, str] | None = None


class Replicas(NamedTuple):
    gateway: Gateway
    servers: list[Server]
    file: Path

    def put(self, version: int) -> None:
        """Swaps the policy file, as an editor or the kubelet does."""
        beside = self.file.with_suffix(".new")
        beside.write_text(policies(version))
        beside.replace(self.file)

    def become(self, version: int) -> None:
        """Puts a version of the policies in force everywhere."""
        self.put(version)
        until(lambda: {in_force(one) for one in self.servers} == {f"version {version}"})


@pytest.fixture(scope="module")
def replicas(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp("replicas")
    file = folder / "policies.yaml"
    file.write_text(policies(1))
    variables = {"RHEOSTAT_POLICY_FILE": str(file)}
    with ExitStack() as ends:
        servers = []
        for name in ("one", "two"):
            servers.append(rheostat_server(checkpoint, folder / name, variables=variables))
            ends.callback(servers[-1].end)
        ports = [server.wait_until_ready().port for server in servers]
        (folder / "nginx").mkdir()
        yield Replicas(ends.enter_context(nginx(folder / "nginx", ports)), servers, file)


class Answer(NamedTuple):
    status: int
    version: tuple[float, str] | None = None


def refused(client: httpx.Client) -> Answer:
    """Asks what the floor refuses, with the fixed text: decided, nothing generated."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "refusal": {"report": True, "categories": {"safety": "never"}},
    }
    answer = client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        return Answer(answer.status_code)
    (choice,) = answer.json()["choices"]
    bias = choice["refusal_report"]["decisions"]["safety"]["bias"]
    return Answer(200, (bias, choice["message"]["refusal"]))


def streamed(client: httpx.Client) -> Answer:
    """Asks for a long answer, as a stream."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Write about the sea."}],
        "stream": True,
        "max_tokens": 200,
        "min_tokens": 200,
        "refusal": {"policy": "lab", "categories": {"safety": "never"}},
    }
    answer = client.post("/v1/chat/completions", json=body)
    is_whole = answer.status_code != 200 or answer.content.endswith(b"data: [DONE]\n\n")
    return Answer(answer.status_code if is_whole else BROKEN)


Ask = Callable[[httpx.Client], Answer]


def send(ask: Ask, client: httpx.Client) -> Outcome:
    began = time.monotonic()
    try:
        answer = ask(client)
    except httpx.TransportError:
        answer = Answer(BROKEN)
    return Outcome(began, time.monotonic(), *answer)


def load(replicas: Replicas, asks: list[Ask], during: Callable[[], None]) -> list[Outcome]:
    """Sends requests from several clients for as long as something else goes on."""
    stop = threading.Event()
    context = replicas.gateway.tls()

    def work(place: int) -> list[Outcome]:
        found = []
        headers = {"authorization": f"Bearer {KEY}"}
        url = replicas.gateway.url
        with httpx.Client(base_url=url, headers=headers, verify=context, timeout=LIMIT_S) as client:
            while not stop.is_set():
                found.append(send(asks[place % len(asks)], client))
        return found

    with ThreadPoolExecutor(CLIENTS) as threads:
        sent = [threads.submit(work, place) for place in range(CLIENTS)]
        try:
            during()
        finally:
            stop.set()
        return [outcome for one in sent for outcome in one.result()]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def in_force(server: Server) -> str:
    answer = server.http.get(
        "/v1/refusal/policies", headers={"authorization": f"Bearer {KEY}"}
    ).json()
    text: str = answer["data"][0]["categories"]["safety"]["refusal_text"]
    return text


def test_no_request_sees_half_a_policy(replicas: Replicas) -> None:
    def change() -> None:
        for version in (2, 3, 4):
            replicas.become(version)

    outcomes = load(replicas, [refused], change)
    assert {outcome.status for outcome in outcomes} == {200}
    seen = Counter(outcome.version for outcome in outcomes)
    whole = {(60.0 + version, f"version {version}") for version in (1, 2, 3, 4)}
    assert seen.keys() <= whole
    assert len(seen) > 1


def test_server_that_is_killed_costs_only_what_it_had_in_flight(replicas: Replicas) -> None:
    dead, alive = replicas.servers
    killed: list[float] = []

    def kill() -> None:
        before = alive.metric("rheostat_decisions_total")
        until(lambda: alive.metric("rheostat_decisions_total") > before + 20)
        killed.append(time.monotonic())
        dead.process.kill()
        dead.process.wait()
        killed.append(time.monotonic())
        after = alive.metric("rheostat_decisions_total")
        until(lambda: alive.metric("rheostat_decisions_total") > after + 50)

    outcomes = load(replicas, [refused, streamed], kill)
    failed = [outcome for outcome in outcomes if outcome.status != 200]
    assert {outcome.status for outcome in failed} <= {BROKEN, 502}
    assert 0 < len(failed) <= CLIENTS
    assert all(one.began <= killed[1] and one.ended >= killed[0] for one in failed)
    assert sum(one.began > killed[1] for one in outcomes) > 20
