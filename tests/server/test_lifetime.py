import asyncio
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from server.lifetime import ending_on_signal
from server.policies.book import Caller
from server.web.admission import Admission

FOREVER_S = 3600.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Puts back what handled the signals before."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def ended(drain_s: float, *steps: Callable[[Admission], object]) -> Admission:
    """Takes steps beside a server, with one answer in flight, and waits for its end."""

    async def run() -> Admission:
        admission = Admission(1)
        place = admission.enter(Caller(None, ()))
        over = asyncio.Event()

        async def end() -> None:
            over.set()

        async with ending_on_signal(admission, drain_s, end):
            for step in steps:
                await asyncio.sleep(0.01)
                assert not over.is_set()
                step(admission)
                if step is answered:
                    place.leave()
            await asyncio.wait_for(over.wait(), 30)
        return admission

    return asyncio.run(run())


def answered(_: Admission) -> None:
    """Stands for the answer's end."""


def signalled(number: signal.Signals) -> Callable[[Admission], object]:
    return lambda _: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_waits_for_what_is_in_flight(number: signal.Signals) -> None:
    def is_draining(admission: Admission) -> None:
        assert admission.draining

    admission = ended(FOREVER_S, signalled(number), is_draining, answered)
    assert admission.held == 0


def test_second_signal_ends_at_once() -> None:
    admission = ended(FOREVER_S, signalled(signal.SIGTERM), signalled(signal.SIGTERM))
    assert admission.held == 1


@pytest.mark.parametrize("drain_s", [0.0, 0.05])
def test_drain_ends_when_its_time_is_over(drain_s: float) -> None:
    assert ended(drain_s, signalled(signal.SIGTERM)).held == 1


def test_server_that_ends_by_itself_waits_for_nothing_and_leaves_the_signals_alone() -> None:
    async def run() -> None:
        async def never() -> None:
            raise AssertionError

        async with ending_on_signal(Admission(1), FOREVER_S, never):
            pass

    asyncio.run(run())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
