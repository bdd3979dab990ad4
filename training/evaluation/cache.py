"""What a server answered, kept beside the report until the report is written."""

import hashlib
import json
from pathlib import Path
from typing import Any, TextIO

from models.files import sync


class Cache:
    """Answers by what was asked; one line each in a file, so that a killed run loses none.

    Args:
        path: None: nothing outlives the process.
        binding: What every answer depends on. A file of another binding is started anew.
    """

    def __init__(self, path: Path | None, binding: object) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        self._file: TextIO | None = None
        if path is not None:
            first = _key(binding)
            if not self._load(path, first):
                path.write_text(first + "\n")
            # The last line may have been cut off.
            self._file = path.open("a", encoding="utf-8")
            self._file.write("\n")

    def __contains__(self, asked: object) -> bool:
        return _key(asked) in self._known

    def __getitem__(self, asked: object) -> Any:
        return self._known[_key(asked)]

    def __setitem__(self, asked: object, answer: Any) -> None:
        key = _key(asked)
        self._known[key] = answer
        if self._file is not None:
            self._file.write(json.dumps([key, answer]) + "\n")
            self._file.flush()

    def close(self, *, remove: bool) -> None:
        """Ends the writing; the file goes once the report is written."""
        if self._path is not None and self._file is not None:
            self._file.close()
            if remove:
                self._path.unlink()
                sync(self._path.parent)

    def _load(self, path: Path, first: str) -> bool:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        if not lines or lines[0] != first:
            return False
        for line in lines[1:]:
            try:
                key, answer = json.loads(line)
            except ValueError:
                continue  # empty, or cut off
            self._known[key] = answer
        return True


def _key(asked: object) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
