"""The blocks of docs/evaluation.md's section on other tools, and where the tools are."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / ".tools"
SECTION = (ROOT / "docs" / "evaluation.md").read_text().partition("\n## Other tools\n")[2]
PAGE_URL = "http://127.0.0.1:8000"
LIMIT_S = 600


def block(tool: str, language: str, url: str) -> str:
    """Returns one tool's block, for a server at `url`."""
    _, _, rest = SECTION.partition(f"\n### {tool}\n")
    part = rest.partition("\n### ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", part, re.DOTALL)
    return str(found).replace(PAGE_URL, url)


def python_of(tool: str) -> Path:
    """Returns a tool's interpreter; the error says how to get it where it is not installed."""
    python = TOOLS / tool / "bin" / "python"
    assert python.exists(), f"{python} is missing: run `make test-tools`"
    return python


def run(*command: str | Path, folder: Path, ok: tuple[int, ...] = (0,), **variables: str) -> str:
    """Runs a tool offline, in a folder of its own, and returns what it printed."""
    own = {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **own, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode in ok, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout
