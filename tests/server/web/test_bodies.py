import asyncio
import threading

import pytest

from server.web.bodies import LARGE_BYTES, aside


@pytest.mark.parametrize(("size", "beside"), [(LARGE_BYTES - 1, False), (LARGE_BYTES, True)])
def test_work_on_a_large_body_is_done_beside_the_event_loop(size: int, beside: bool) -> None:
    async def thread() -> threading.Thread:
        return await aside(size, threading.current_thread)

    assert (asyncio.run(thread()) is not threading.current_thread()) == beside
