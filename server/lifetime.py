"""From the start of the server's processes to their end: signals, and what is in flight then."""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from models.errors import ServiceError

if TYPE_CHECKING:
    from fastapi import FastAPI

# For what is in flight at the end, unless --shutdown-timeout says otherwise.
DRAIN_S = 30
# For an engine without work to end.
RELEASE_S = 5
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


def log_to_stderr() -> None:
    """Has the server's own log written, in a process that has just begun."""
    log = logging.getLogger("server")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())


def ignore_hangups() -> None:
    """Ignores SIGHUP in this process and in those that it starts from here on.

    SIGHUP reloads the policies. It may reach all processes, and before they serve.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def follow_parent() -> None:
    """Has a spawned process end with its parent, and by its parent only.

    vLLM's engine process would otherwise outlive a killed API server and keep its memory, and end
    before what is in flight on a Ctrl-C, which the terminal sends to the whole group. A spawned
    process runs its parent's main module under the name ``__mp_main__``.
    """
    if sys.platform == "linux" and "__mp_main__" in sys.modules:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)


class Drained(Protocol):
    """What takes no more requests once it is told, and knows when the last one is answered."""

    held: int
    draining: bool

    def drain(self) -> None:
        """Takes no more."""

    async def idle(self) -> None:
        """Waits for the last one."""


class Engine(Protocol):
    """What can end at any time, by itself or because it is told."""

    @property
    def errored(self) -> bool:
        """Whether it has ended."""

    async def fail_all(self) -> None:
        """Ends it at once, with all that is in flight."""


async def serve_until_ended(
    serving: Coroutine[Any, Any, Awaitable[None]],
    app: "FastAPI",
    engine: Engine,
    admission: Drained,
    drain_s: float,
) -> None:
    """Serves until a signal, or until the engine ends by itself.

    Args:
        serving: vLLM's server, which returns the rest of its shutdown.
        app: Its app.
        engine: Its engine.
        admission: Lets requests in.
        drain_s: How long what is in flight may take.

    Raises:
        ServiceError: The engine has ended by itself.
    """

    async def end() -> None:
        if admission.held:
            await engine.fail_all()
        app.state.server.should_exit = True

    server = asyncio.create_task(serving)
    await asyncio.sleep(0)  # vLLM's own handlers of signals are in place, which do not drain
    async with ending_on_signal(admission, drain_s, end):
        await (await server)
    if engine.errored and not admission.draining:
        raise ServiceError("the engine has ended by itself; vLLM's log above says why")


@asynccontextmanager
async def ending_on_signal(
    admission: Drained, drain_s: float, end: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Ends the block's server on SIGTERM or SIGINT: drained, or at once on a second signal.

    Args:
        admission: Lets requests in.
        drain_s: How long what is in flight may take.
        end: Ends the server. It is awaited, unless the block ends first.
    """
    asked, hurried = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        (hurried if asked.is_set() else asked).set()
        admission.drain()

    async def work() -> None:
        await asked.wait()
        _log.info("ending: %d answers are in flight and have %g s", admission.held, drain_s)
        waiting = [asyncio.create_task(event) for event in (admission.idle(), hurried.wait())]
        await asyncio.wait(waiting, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if admission.held:
            _log.warning("ending: %d answers in flight fail", admission.held)
        await end()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    task = asyncio.create_task(work())
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
