"""Which memory goes into huge pages, and that it does."""

import subprocess
import sys
from pathlib import Path

import pytest

from server import huge_pages
from server.huge_pages import collapse_memory, whole_pages
from tests.huge_pages import huge_pages_are_given

PAGE = 0x200000
MAPS = """\
00400000-00a00000 rw-p 00000000 00:00 0
00d00000-01100000 rw-p 00000000 00:00 0                                  [heap]
01300000-01700000 rw-p 00000000 00:00 0
02000000-02400000 r--p 00000000 00:00 0
03000000-03400000 rw-s 00000000 00:00 0
04000000-04400000 rw-p 00000000 fe:00 131                                /usr/lib/libpython3.so
05000000-05400000 rw-s 00000000 00:01 77                                 /dev/zero (deleted)
06000000-06400000 rw-p 00000000 00:00 0                                  [stack]
07000000-07100000 rw-p 00000000 00:00 0
7f0000000000-7f0040200000 rw-p 00000000 00:00 0
"""


def test_whole_pages_of_the_processes_own_memory_alone() -> None:
    assert [f"{place:x}" for place in whole_pages(MAPS, PAGE)] == [
        "400000",
        "600000",
        "800000",
        "e00000",
        "1400000",
    ]


@pytest.mark.parametrize(
    ("enabled", "page"),
    [("always madvise [never]", PAGE), ("always [madvise] never", 2**29), (None, PAGE)],
)
def test_systems_that_give_no_huge_pages_are_left_alone(
    enabled: str | None, page: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hpage_pmd_size").write_text(f"{page}\n")
    if enabled is not None:
        (tmp_path / "enabled").write_text(f"{enabled}\n")
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path)
    assert collapse_memory.__wrapped__() == 0


FILLED = """
import os
from server.huge_pages import collapse_memory
from tests.huge_pages import bytes_in_huge_pages

held = [bytes(400) for _ in range(200_000)]
counted = collapse_memory()
found = bytes_in_huge_pages(os.getpid())
intact = all(one == bytes(400) for one in held)
print(counted, found, intact)
"""


@pytest.mark.skipif(not huge_pages_are_given(), reason="this system gives no huge pages")
def test_memory_in_use_lies_in_huge_pages_and_stays_as_it_was() -> None:
    told = subprocess.run(
        [sys.executable, "-c", FILLED], capture_output=True, text=True, check=True, timeout=60
    )
    counted, found, intact = told.stdout.split()
    # How much depends on how much of the system's memory lies together just now.
    assert int(counted) > 0
    assert int(found) >= int(counted)
    assert intact == "True"
