import asyncio

import pytest

from server.background import on_daemon, repeated


def test_work_is_repeated_woken_and_finished() -> None:
    calls: list[bool] = []
    ran = asyncio.Event()

    async def work(woken: bool) -> None:
        calls.append(woken)
        ran.set()

    async def serve() -> None:
        async with repeated(work, 0.001, finishes=True):
            await ran.wait()
        assert (calls[0], calls[-1]) == (False, True)
        calls.clear()
        ran.clear()
        async with repeated(work, 3600, finishes=True) as wake:
            wake()
            await ran.wait()
        assert calls == [True, True]

    asyncio.run(asyncio.wait_for(serve(), 30))


def test_work_that_does_not_finish_is_cancelled_at_the_end() -> None:
    began = asyncio.Event()

    async def hang(_: bool) -> None:
        began.set()
        await asyncio.Event().wait()

    async def serve() -> None:
        async with repeated(hang, 0.001, finishes=False):
            await began.wait()

    asyncio.run(asyncio.wait_for(serve(), 30))


def test_daemon_gives_its_result_or_its_error() -> None:
    assert on_daemon(lambda: 5).result(30) == 5
    with pytest.raises(ZeroDivisionError):
        on_daemon(lambda: 1 // 0).result(30)
