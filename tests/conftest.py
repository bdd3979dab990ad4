"""Which tests one process runs where `make test` uses two."""

from typing import Any

import pytest


# pytest-xdist's; without it there is one process.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives a file to one process, whose fixtures are its own, and all that share servers to one.

    Its marker `xdist_group`, which is made for this, does nothing under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = _what_stays_together
    return scheduler


def _what_stays_together(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return "tests/e2e" if file.startswith("tests/e2e/") else file
