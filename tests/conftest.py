"""Which tests one process runs where `make test` uses two."""

from typing import Any

import pytest


# pytest-xdist's; without it there is one process.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives a file to one process, whose fixtures are its own, and those that share servers too.

    Its marker `xdist_group`, which is made for this, does nothing under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = _what_stays_together
    return scheduler


# Each file of these has servers of its own.
_OWN_SERVERS = frozenset(
    f"tests/e2e/test_{name}.py" for name in ("published", "telemetry", "tokens")
)
# Those within a folder share its servers.
_SHARED_SERVERS = ("tests/e2e/stock", "tests/e2e")


def _what_stays_together(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    if file in _OWN_SERVERS:
        return file
    return next((folder for folder in _SHARED_SERVERS if file.startswith(f"{folder}/")), file)
