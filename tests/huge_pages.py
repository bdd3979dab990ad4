"""What Linux gives, and what a process has."""

import platform
from pathlib import Path

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")


def huge_pages_are_given() -> bool:
    """Returns whether a process that asks for huge pages of 2 MiB gets them."""
    release = platform.release().split(".")
    if not _SYSTEM.exists() or (int(release[0]), int(release[1])) < (6, 1):
        return False
    if "[never]" in (_SYSTEM / "enabled").read_text():
        return False
    return int((_SYSTEM / "hpage_pmd_size").read_text()) == 2**21


def bytes_in_huge_pages(pid: int) -> int:
    """Returns how much of a process's own memory lies in huge pages."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("AnonHugePages:"))
    return 1024 * int(found.split()[1])
