"""Runs ``rheostat`` in a process that gets no huge pages: what the collapsing of memory is worth.

Usage: ``python -m benchmarks.serving.small_pages serve ...``
"""

import ctypes

_PR_SET_THP_DISABLE = 41


def main() -> None:
    """Switches huge pages off, for child processes as well, and runs the command line."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_THP_DISABLE)")
    import rheostat

    rheostat.main()


if __name__ == "__main__":
    main()
