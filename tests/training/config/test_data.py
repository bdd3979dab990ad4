from pathlib import Path

import pytest

from models.errors import ConfigError
from training.config.data import Source, named_sources


def test_file_is_one_source_and_a_list_is_several(tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text("- a.csv\n- {hub: owner/name, weight: 2}\n")

    assert named_sources(Path("a.csv")) == (Source(path="a.csv"),)
    assert named_sources(path) == (Source(path="a.csv"), Source(hub="owner/name", weight=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: a.csv\n", r"must be a list of sources"),
        ("[]\n", r"names no source"),
        ("- {path: a.csv, colour: red}\n", r"0\.colour: no such field"),
        ("- {path: a.csv, columns: {question: prompt}}\n", r"0\.columns\.question: .*input should"),
        ("- {path: a.csv, path: b.csv}\n", r"invalid YAML: duplicate field 'path'"),
    ],
)
def test_wrong_list_is_named_with_its_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=rf"sources\.yaml(:1)?: {message}"):
        named_sources(path)
