"""OpenAI's and LangChain's clients see refusals where they look for them."""

from pathlib import Path

import pytest

from tests.e2e.servers import Server
from tests.e2e.tools.blocks import block, python_of, run

pytestmark = pytest.mark.tools


STREAMED = """\
print("".join(chunk.text for chunk in model.stream("What is the capital of France?")))
"""


def test_parse_of_openais_client_gives_the_refusal(server: Server, tmp_path: Path) -> None:
    script = block("OpenAI's client", "python", server.url)

    said = run(python_of("clients"), "-c", script, folder=tmp_path)

    assert said.startswith("None ")
    assert len(said) > len("None \n")


def test_langchain_has_the_refusal_beside_its_content(server: Server, tmp_path: Path) -> None:
    script = block("LangChain", "python", server.url)

    plain, structured = run(python_of("clients"), "-c", script, folder=tmp_path).splitlines()

    assert plain.startswith("'' ")
    assert plain[3:]
    assert structured


@pytest.mark.parametrize("in_content", [True, False])
def test_langchain_streams_refusals_only_in_content(
    server: Server, tmp_path: Path, in_content: bool
) -> None:
    script = block("LangChain", "python", server.url).partition("answer =")[0] + STREAMED
    if in_content:
        both = '"refusal": {"refusal_in": ["refusal", "content"], '
        script = script.replace('"refusal": {', both)

    said = run(python_of("clients"), "-c", script, folder=tmp_path)

    assert bool(said.strip()) is in_content
