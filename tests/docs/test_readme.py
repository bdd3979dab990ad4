"""What the README and docs/ say is there, is there."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from rheostat import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)\)")
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Returns the commands of a page's shell blocks, split as a shell would."""
    blocks = [block.replace("\\\n", " ") for block in SHELL.findall(page.read_text())]
    return [
        shlex.split(line, comments=True)
        for block in blocks
        for line in re.sub(r"'\{.*?\}'", "BODY", block, flags=re.DOTALL).splitlines()
        if line.strip()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_outside_tables_have_at_most_100_columns(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rheostat_commands_and_their_options_exist(page: Path) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(page):
        tools = [place for place, word in enumerate(words) if word.endswith("bin/rheostat")]
        for place in tools:
            name, *rest = words[place + 1 :]
            assert name in known, words
            if name == "serve":  # passes vLLM's flags through
                continue
            command = known[name]
            while rest and rest[0] in getattr(command, "commands", {}):
                command = command.commands[rest.pop(0)]
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= options, words


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        words[1] for page in PAGES for words in commands(page) if words[0] == "make" and words[1:]
    }
    assert named
    assert named <= targets


def test_readme_maps_every_folder() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folders = {path.split("/")[0] for path in listed if "/" in path and not path.startswith(".")}
    readme = (ROOT / "README.md").read_text()
    assert folders
    assert [folder for folder in sorted(folders) if f"[`{folder}/`]({folder})" not in readme] == []


def test_gate_runs_the_test_commands_of_the_readme() -> None:
    readme = [" ".join(words) for words in commands(ROOT / "README.md")]
    gate = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in ("make test", "make test-long"):
        assert command in readme
        assert command in gate
    assert "make lint" in gate
