import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator

import pytest
from fastapi import FastAPI

from models.errors import ServiceError
from server.lifetime import ending_on_signal, serve_until_ended
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


class FakeEngine:
    """An engine that lives, or has ended by itself."""

    def __init__(self, *, errored: bool = False) -> None:
        self.errored = errored
        self.failed = False

    async def fail_all(self) -> None:
        self.errored = self.failed = True


class FakeServer:
    should_exit = False


def serve(engine: FakeEngine, admission: Admission, drain_s: float = FOREVER_S) -> None:
    """Serves until vLLM would: its engine has ended, or it was told to."""
    app = FastAPI()
    app.state.server = FakeServer()

    async def rest() -> None:
        pass

    async def serving() -> Coroutine[None, None, None]:
        await asyncio.sleep(0.01)  # until the signals are handled
        if not engine.errored:
            os.kill(os.getpid(), signal.SIGTERM)
        while not (engine.errored or app.state.server.should_exit):
            await asyncio.sleep(0.01)
        return rest()

    running = serve_until_ended(serving(), app, engine, admission, drain_s)
    asyncio.run(asyncio.wait_for(running, 30))


def test_engine_that_ends_by_itself_is_an_error_for_the_supervisor() -> None:
    with pytest.raises(ServiceError, match="ended by itself"):
        serve(FakeEngine(errored=True), Admission(1))


def test_engine_of_a_drained_server_is_left_to_end_in_peace() -> None:
    engine = FakeEngine()
    serve(engine, Admission(1))
    assert not engine.failed


def test_what_is_left_when_the_time_is_over_fails() -> None:
    engine, admission = FakeEngine(), Admission(1)
    admission.enter(Caller(None, ()))
    serve(engine, admission, drain_s=0.01)
    assert engine.failed
