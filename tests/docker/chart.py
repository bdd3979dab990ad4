"""The Helm chart, rendered by Helm's own library; writes what is made of it (`make manifests`)."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import helm_python
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docker" / "helm" / "rheostat"
README = CHART / "README.md"
MANIFESTS = ROOT / "docker" / "kubernetes.yaml"
NAMESPACE = "rheostat"
_LINE = re.compile(r"^( *)(#|[A-Za-z]+:)(?: (.*))?$")
_MADE = "# Made by `make manifests` from docker/helm/rheostat, with its default values.\n"
_TABLE = re.compile(r"(?<=<!-- values -->\n\n).*?(?=\n<!-- end -->)", re.DOTALL)


def render(values: Mapping[str, Any] | None = None, *, name: str = "rheostat") -> dict[str, str]:
    """Returns what `helm template` prints, by file name.

    Args:
        values: Beside the chart's own.
        name: The release's.

    Raises:
        helm_python.HelmError: A value is wrong, or a template.
    """
    with helm_python.Chart.load(CHART) as chart:
        texts = chart.render(dict(values or {}), name=name, namespace=NAMESPACE)
    files = {path.rpartition("/")[2]: text.strip() for path, text in sorted(texts.items())}
    return {file: text for file, text in files.items() if text}


def manifests(values: Mapping[str, Any] | None = None, *, name: str = "rheostat") -> list[Any]:
    """Returns all objects that a release has."""
    texts = [text for file, text in render(values, name=name).items() if file.endswith(".yaml")]
    return [one for text in texts for one in yaml.safe_load_all(text) if one]


def plain_manifests() -> str:
    """Returns the text of docker/kubernetes.yaml."""
    texts = [text for file, text in render().items() if file.endswith(".yaml")]
    return _MADE + "".join(f"---\n{text}\n" for text in texts)


class Value(NamedTuple):
    """A line of values.yaml that sets something.

    Attributes:
        path: Its keys, with dots between them.
        default: As written; empty where lines of its own follow.
        meaning: The comment above it.
    """

    path: str
    default: str
    meaning: str


def values() -> Iterator[Value]:
    """Yields every line of values.yaml that has a comment of its own."""
    comment: list[str] = []
    parents: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        if not (match := _LINE.match(line)):
            comment = []
            continue
        indent, key, rest = match.groups()
        if key == "#":
            comment.append(rest)
            continue
        parents[len(indent) // 2 :] = [key.removesuffix(":")]
        if comment:
            yield Value(".".join(parents), rest or "", " ".join(comment))
        comment = []


def table() -> str:
    """Returns the chart's values as a table of Markdown."""
    rows = "".join(
        f"| `{value.path}` | {f'`{value.default}`' if value.default else ''} | {value.meaning} |\n"
        for value in values()
    )
    return f"| value | default | meaning |\n|---|---|---|\n{rows}"


def readme() -> str:
    """Returns the chart's README with the table as it should be."""
    text, places = _TABLE.subn(lambda _: table(), README.read_text())
    assert places == 1
    return text


if __name__ == "__main__":
    README.write_text(readme())
    MANIFESTS.write_text(plain_manifests())
