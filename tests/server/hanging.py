"""A path that hangs as one on a mount whose server is gone: with whatever opens or asks for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PosixPath


class HangingPath(PosixPath):
    """Hangs while ``hangs()`` runs."""

    _answers = threading.Event()
    _answers.set()

    def __fspath__(self) -> str:
        self._answers.wait()
        return str(self)

    @classmethod
    @contextmanager
    def hangs(cls) -> Iterator[None]:
        """Lets all such paths hang, and answer at the end."""
        cls._answers.clear()
        try:
            yield
        finally:
            cls._answers.set()
