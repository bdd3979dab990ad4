"""Which signals end the server's processes, and that workers end with the one that started them."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def ignore_hangups() -> None:
    """Has SIGHUP end neither this process nor those that it starts from here on.

    It means "read the policies again", also when it is sent to all of them or before they serve.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def end_with_parent() -> None:
    """Has Linux kill this process, if it was spawned, when its parent dies, however that dies.

    vLLM's engine process otherwise outlives a killed API server and keeps its memory. A spawned
    process runs its parent's main module under the name ``__mp_main__``.
    """
    if sys.platform == "linux" and "__mp_main__" in sys.modules:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
