"""Which tests stay together where `make test` runs them in two processes."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Has one process run a file, whose fixtures are its own, and one all that share servers."""
    for item in items:
        group = "e2e" if "e2e" in item.path.parts else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
