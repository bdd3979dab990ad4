"""Huge pages for the memory that a process holds before its first request.

A request touches Python objects all over hundreds of megabytes: more pages than the TLB holds, and
a virtual machine pays twice for each miss. Most Linux distributions give huge pages to processes
that ask, and neither Python nor vLLM asks.
"""

import ctypes
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
# Larger ones, as on some ARM kernels, would waste memory.
_LARGEST_PAGE = 2**21
# Larger mappings are weights and caches, which take as long to move as to load.
_LARGEST_PLACE = 2**30
_MADV_COLLAPSE = 25  # of Linux 6.1
_OWN = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(?:\[heap\])?")


@cache
def collapse_memory() -> int:
    """Moves the process's resident memory into huge pages, once.

    Returns:
        Bytes in huge pages; 0 where the system gives none.
    """
    page = _page_bytes(_SYSTEM)
    if not 0 < page <= _LARGEST_PAGE:
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    places = whole_pages(Path("/proc/self/maps").read_text(), page)
    return page * sum(int(madvise(place, page, _MADV_COLLAPSE) == 0) for place in places)


def whole_pages(maps: str, page: int) -> Iterator[int]:
    """Yields the address of every huge page that fits into the process's private mappings.

    Args:
        maps: The text of ``/proc/PID/maps``.
        page: Bytes of a huge page.
    """
    for line in maps.splitlines():
        if (found := _OWN.fullmatch(line)) is not None:
            start, end = int(found[1], 16), int(found[2], 16)
            if end - start <= _LARGEST_PLACE:
                yield from range(-(-start // page) * page, end - page + 1, page)


def _page_bytes(system: Path) -> int:
    try:
        given = (system / "enabled").read_text()
        return 0 if "[never]" in given else int((system / "hpage_pmd_size").read_text())
    except (OSError, ValueError):  # no Linux, or one without huge pages
        return 0
