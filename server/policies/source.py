"""A YAML file that an operator wrote, and the line of every field for what is wrong with it."""

import os
import stat
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from models.errors import ConfigError
from models.files import parse_yaml
from server.background import on_daemon

MOST_BYTES = 2**22
READ_TIMEOUT_S = 5.0

FieldPath = tuple[str | int, ...]


class Problem(NamedTuple):
    """Something wrong in a file.

    Attributes:
        path: Of the field, from the top.
        message: What is wrong and what would be right.
    """

    path: FieldPath
    message: str


class FileError(ConfigError):
    """A file that cannot be used.

    Attributes:
        problems: One line each, ``FILE:LINE: FIELD: what is wrong``, in the file's order.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems = tuple(problems)


class Source:
    """One YAML document and where its fields stand.

    Attributes:
        path: The file.
        value: The document as plain Python values.

    Raises:
        FileError: The file cannot be read or is invalid YAML.
    """

    def __init__(self, path: Path, timeout_s: float = READ_TIMEOUT_S) -> None:
        self.path = path
        self._text = _text_of(path, timeout_s)
        try:
            self.value = parse_yaml(self._text, str(path))
        except ConfigError as error:
            raise FileError([error.message]) from error

    def error(self, problems: Sequence[Problem]) -> FileError:
        """Returns problems as an error, each with its line, in the order of lines."""
        placed = sorted((self.line(path), _dotted(path), message) for path, message in problems)
        return FileError(
            [
                f"{self.path}:{line}: {f'{field}: ' if field else ''}{message}"
                for line, field, message in placed
            ]
        )

    def line(self, path: FieldPath) -> int:
        """Returns the line, from 1, of a field, or of the nearest field around it."""
        node = self._with_lines
        top = _position(node)
        line = 1 if top is None else top.line + 1
        for part in path:
            owner = _owner(node, part)
            if owner is None:
                break
            line = owner.lc.data[part][0] + 1
            node = owner[part]
        return line

    @cached_property
    def _with_lines(self) -> Any:
        # For an error only: it takes twice as long as `parse_yaml`, while requests wait.
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        reader = YAML(pure=True)
        reader.allow_duplicate_keys = True  # `parse_yaml` rejects those that matter
        try:
            return reader.load(self._text)
        except (YAMLError, ValueError):  # YAML 1.2, where `parse_yaml` reads 1.1
            return None


def _dotted(path: FieldPath) -> str:
    return ".".join(map(str, path))


def _position(node: Any) -> Any:
    return getattr(node, "lc", None)  # scalars have none


def _owner(node: Any, part: str | int) -> Any:
    """Returns what holds a field: a mapping or sequence, or what is merged (`<<`) into it."""
    for candidate in (node, *getattr(node, "merge", ())):
        position = _position(candidate)
        if position is not None and part in (position.data or ()):
            return candidate
    return None


def _text_of(path: Path, timeout_s: float) -> str:
    try:
        return on_daemon(partial(_read, path)).result(timeout_s)
    except TimeoutError:
        reason = f"no answer within {timeout_s:g} s"
    except OSError as error:
        reason = str(error.strerror)
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8: {error.reason}"
    raise FileError([f"{path}: it cannot be read: {reason}"])


def _read(path: Path) -> str:
    # Opening a FIFO would wait for a writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileError([f"{path}: it cannot be read: it is not a regular file"])
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise FileError([f"{path}: it cannot be read: it has more than {MOST_BYTES} bytes"])
    return raw.decode("utf-8")
