"""No single request keeps the server from answering others."""

import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import NamedTuple

import pytest

from tests.e2e.held_loop import Body, worst_bodies
from tests.e2e.servers import Server

# Ten times what it takes (docs/security.md), for machines that are busy with something else.
LONGEST_S = 1.0
JSON = {"content-type": "application/json"}


class Poll(NamedTuple):
    """One answer of ``/healthz``; seconds of ``time.perf_counter()``."""

    asked_s: float
    answered_s: float

    @property
    def took_s(self) -> float:
        return self.answered_s - self.asked_s


class Poller:
    """Asks for ``/healthz`` all the time, on a connection of its own."""

    def __init__(self, server: Server) -> None:
        self._connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        self._ended = threading.Event()
        self.polls: list[Poll] = []
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def _poll(self) -> None:
        while not self._ended.wait(0.002):
            asked_s = time.perf_counter()
            self._connection.request("GET", "/healthz")
            assert self._connection.getresponse().read() == b'{"status":"alive"}'
            self.polls.append(Poll(asked_s, time.perf_counter()))

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self._connection.close()

    def since(self, started_s: float) -> list[Poll]:
        """Returns the polls that were under way at a time or later, one after now included."""
        now_s = time.perf_counter()
        while not (self.polls and self.polls[-1].asked_s > now_s):
            assert self._thread.is_alive()
            self._ended.wait(0.002)
        return [poll for poll in self.polls if poll.answered_s > started_s]


@pytest.fixture(scope="module")
def poller(server: Server) -> Iterator[Poller]:
    running = Poller(server)
    yield running
    running.end()


@pytest.mark.parametrize("body", worst_bodies(), ids=lambda body: f"{body.path} {body.name}")
def test_no_body_holds_the_event_loop(
    server: Server, poller: Poller, body: Body, record_property: Callable[[str, object], None]
) -> None:
    started_s = time.perf_counter()
    answer = server.http.post(body.path, content=body.raw, headers=JSON)
    ended_s = time.perf_counter()
    polls = [poll for poll in poller.since(started_s) if poll.asked_s < ended_s]
    # None where the answer came between two polls.
    longest_s = max((poll.took_s for poll in polls), default=0.0)
    record_property("held_ms", round(longest_s * 1e3, 1))
    assert answer.status_code < 500
    assert longest_s < LONGEST_S
