"""Signals of the server's processes; workers end with the process that started them."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def ignore_hangups() -> None:
    """Ignores SIGHUP in this process and in those that it starts from here on.

    SIGHUP reloads the policies. It may reach all processes, and before they serve.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def end_with_parent() -> None:
    """Has Linux kill this process, if it was spawned, when its parent dies for any reason.

    vLLM's engine process would otherwise outlive a killed API server and keep its memory. A spawned
    process runs its parent's main module under the name ``__mp_main__``.
    """
    if sys.platform == "linux" and "__mp_main__" in sys.modules:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
