"""OpenAI's and LangChain's clients see refusals where they look for them."""

from pathlib import Path

import pytest

from tests.e2e.servers import Server
from tests.e2e.tools.blocks import block, python_of, run

pytestmark = pytest.mark.tools


def refusal_of(server: Server, question: str) -> str:
    """Returns what the server refuses a question with."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "refusal": {"categories": {"safety": "always"}},
        "temperature": 0,
    }
    answer = server.http.post("/v1/chat/completions", json=body).json()
    return str(answer["choices"][0]["message"]["refusal"])


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
