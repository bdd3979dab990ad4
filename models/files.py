"""Files: written in full or not at all, and YAML without duplicate fields."""

import os
from pathlib import Path
from typing import Any, ClassVar

import yaml

from models.errors import ConfigError

_MERGE_TAG = "tag:yaml.org,2002:merge"
# With aliases written out: a few lines of aliases to aliases can stand for billions of values.
MOST_VALUES = 1_000_000


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


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Loader(yaml.SafeLoader):
    """Rejects duplicate fields, of which YAML would take the last, and aliases that multiply.

    In Python: libyaml's loader crashes the process where brackets nest deeply.
    """

    # lm-format-enforcer, which vLLM imports with the first grammar, has SafeLoader's own make texts
    # of times.
    yaml_constructors: ClassVar[Any] = {
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_timestamp,
    }

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Returns how many values a node stands for, its aliases written out.

    Args:
        node: The root of what is counted.
        counts: By the id of each collection, what it stands for; 0 while it is being counted.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = 0
        children = node.value
        if isinstance(node, yaml.MappingNode):
            _check_duplicates(node)
            children = [child for pair in node.value for child in pair]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    if not 0 < counts[id(node)] <= MOST_VALUES:
        problem = f"aliases make it more than {MOST_VALUES} values, or hold themselves"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return counts[id(node)]


def _check_duplicates(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else ""
        if name in seen and key.tag != _MERGE_TAG:
            problem = f"duplicate field {name!r}"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        seen.add(name)


def parse_yaml(text: str, origin: str) -> Any:
    """Returns what a YAML document holds.

    Args:
        text: The document.
        origin: What an error calls it; the line follows where it is known.

    Raises:
        ConfigError: It is invalid YAML, or has a duplicate field.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin}{place}: invalid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{origin}: invalid YAML: {reason}") from error
