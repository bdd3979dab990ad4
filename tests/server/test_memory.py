"""The memory of the HTTP process does not grow with what it has answered."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import save_toy

# Of the allocator's blocks, a request. The least leak is one; caches come and go.
MOST_LEFT = 0.5


@pytest.mark.long
@pytest.mark.timeout(660)
def test_no_kind_of_request_leaves_anything_in_memory(tmp_path: Path) -> None:
    save_toy(tmp_path)
    command = [sys.executable, "-m", "tests.server.left_behind", str(tmp_path)]
    subprocess.run([*command, str(tmp_path / "found.json")], check=True, timeout=600)
    left = json.loads((tmp_path / "found.json").read_text())
    assert len(left) == 6
    assert {kind: blocks for kind, blocks in left.items() if blocks >= MOST_LEFT} == {}
