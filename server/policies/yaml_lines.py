"""YAML with the line of every field, so that an error says where to look."""

import os
import stat
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from models.errors import ConfigError
from server.policies import daemons

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


class YamlFile:
    """One YAML document and where its fields stand.

    Args:
        path: The file.

    Attributes:
        value: The document as plain Python values; a field that stands twice is an error.

    Raises:
        FileError: The file cannot be read, is no YAML, or has a field twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = daemons.start(partial(_read, path)).result(READ_TIMEOUT_S)
        except TimeoutError as error:
            raise FileError(
                [f"{path}: it cannot be read: no answer within {READ_TIMEOUT_S:g} s"]
            ) from error
        except OSError as error:
            raise FileError([f"{path}: it cannot be read: {error.strerror}"]) from error
        except UnicodeDecodeError as error:
            raise FileError([f"{path}: it is no UTF-8: {error.reason}"]) from error
        try:
            loader = yaml.SafeLoader(text)  # not the one in C: deep nesting crashes the process
            self._root = loader.get_single_node()
            repeated = _repeated(self._root)
            empty = self._root is None
            self.value: Any = None if empty else loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            raise FileError([f"{self._at_mark(error)}: {error.problem}"]) from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            first = str(error).splitlines() or ["it nests too deeply"]
            raise FileError([f"{path}: {first[0]}"]) from error
        if repeated:
            raise FileError([f"{path}:{line}: {key} stands there twice" for line, key in repeated])

    def error(self, problems: Sequence[Problem]) -> FileError:
        """Returns problems as an error, each with its line, in the order of lines."""
        placed = sorted((self.line(p.path), _dotted(p.path), p.message) for p in problems)
        return FileError(
            [
                f"{self.path}:{line}: {field}: {message}"
                if field
                else f"{self.path}:{line}: {message}"
                for line, field, message in placed
            ]
        )

    def line(self, path: FieldPath) -> int:
        """Returns the line, from 1, of a field, or of the nearest one around it that is there."""
        node = self._root
        line = 1 if node is None else node.start_mark.line + 1
        for part in path:
            found = _child(node, part)
            if found is None:
                break
            key, node = found
            line = key.start_mark.line + 1
        return line

    def _at_mark(self, error: yaml.MarkedYAMLError) -> str:
        mark = error.problem_mark or error.context_mark
        return f"{self.path}:{mark.line + 1}" if mark else str(self.path)


def _read(path: Path) -> str:
    # Opening a FIFO would wait for a writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileError([f"{path}: it cannot be read: it is no regular file"])
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise FileError([f"{path}: it cannot be read: it has more than {MOST_BYTES} bytes"])
    return raw.decode("utf-8")


def _dotted(path: FieldPath) -> str:
    return ".".join(str(part) for part in path)


def _child(node: Any, part: str | int) -> tuple[Any, Any] | None:
    """Returns the node that stands for a part's place, and that of its value."""
    if isinstance(node, yaml.SequenceNode):
        inside = isinstance(part, int) and part < len(node.value)
        return (node.value[part], node.value[part]) if inside else None
    if not isinstance(node, yaml.MappingNode):
        return None
    # Construction has put what is merged (`<<`) in front of the mapping's own fields.
    return next((pair for pair in reversed(node.value) if pair[0].value == str(part)), None)


def _repeated(root: Any) -> list[tuple[int, str]]:
    """Returns the line and name of every field that its mapping already has."""
    repeated: list[tuple[int, str]] = []
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        keys: set[str] = set()
        for key, value in node.value:
            if key.value in keys if isinstance(key.value, str) else False:
                repeated.append((key.start_mark.line + 1, key.value))
            keys.add(str(key.value))
            waiting.append(value)
    return sorted(repeated)
