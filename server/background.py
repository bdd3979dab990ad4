"""Work beside the requests: repeated on the event loop, or on a thread that nobody waits for."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

Result = TypeVar("Result")


@asynccontextmanager
async def repeated(
    work: Callable[[bool], Awaitable[None]], every_s: float, *, finishes: bool
) -> AsyncIterator[Callable[[], None]]:
    """Repeats work for as long as the block runs.

    Args:
        work: Its argument says whether it was woken, by the block or by the block's end.
        every_s: Pause between two repetitions.
        finishes: Whether the block's end waits for a last repetition; else it cancels the work.

    Yields:
        What wakes the work before its pause is over.
    """
    woken, ended = asyncio.Event(), asyncio.Event()

    async def repeat() -> None:
        last = False
        while not last:
            with suppress(TimeoutError):
                await asyncio.wait_for(woken.wait(), every_s)
            # Read before the work: what comes up during it needs one more repetition.
            early, last = woken.is_set(), ended.is_set()
            woken.clear()
            await work(early)

    task = asyncio.create_task(repeat())
    try:
        yield woken.set
    finally:
        if finishes:
            ended.set()
            woken.set()
            await task
        else:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def on_daemon(work: Callable[[], Result]) -> Future[Result]:
    """Starts work that may hang: the interpreter's exit does not wait for a daemon thread."""
    future: Future[Result] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
