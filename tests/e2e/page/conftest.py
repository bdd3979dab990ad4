from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.e2e.calibrating import KEY, CalibratedServer
from tests.e2e.page.browser import Visit, chromium, visit


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A browser of this folder's tests alone: no other test's `asyncio.run` works beside it."""
    with chromium() as running:
        yield running


@pytest.fixture
def opened(browser: Browser, calibrated: CalibratedServer) -> Iterator[Visit]:
    """The page of a calibrated server; whatever the test did, the page kept to its rules."""
    with visit(browser, calibrated.server.url, KEY) as running:
        yield running
        assert running.problems == []
        assert running.foreign() == []
