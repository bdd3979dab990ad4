"""Files: written in full or not at all, and YAML in which each field stands once."""

import os
from pathlib import Path
from typing import Any

import yaml

from models.errors import ConfigError

_MERGE_TAG = "tag:yaml.org,2002:merge"


def write_atomically(path: Path, content: str | bytes, *, unique: bool = False) -> None:
    """Writes a file that is there in full or not at all, whenever the process is killed.

    Args:
        path: The file.
        content: Text is written as UTF-8.
        unique: Whether several processes may write the file at the same time. Each one then writes
            beside it under a name of its own, which a killed process leaves there.
    """
    own = f".{os.getpid()}" if unique else ""
    partial = path.with_name(f"{path.name}{own}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        if partial.is_file():
            partial.unlink()
    sync(path.parent)


def sync(folder: Path) -> None:
    """Has the names in a folder written to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _EachFieldOnce(yaml.SafeLoader):
    """Rejects a duplicate field, of which YAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in seen and key.tag != _MERGE_TAG:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the field {name!r} stands there twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, origin: str) -> Any:
    """Returns what a YAML document holds.

    Args:
        text: The document.
        origin: What an error calls it.

    Raises:
        ConfigError: It is no YAML, or a field stands there twice.
    """
    try:
        return yaml.load(text, _EachFieldOnce)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{origin}: is no YAML: {reason}") from error
