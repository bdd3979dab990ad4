"""The examples, run as the README says."""

import subprocess
import sys
from pathlib import Path

from tests.e2e.servers import Server

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_chat_example_turns_the_dial_from_answer_to_refusal(server: Server) -> None:
    url = f"{server.url}/v1"
    lines = run(sys.executable, str(EXAMPLES / "chat.py"), "--base-url", url).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("safety=never   answered ")
    assert "Paris" in lines[0]
    assert lines[-1].startswith("safety=always  refused ")


def test_stream_example_prints_the_whole_answer(server: Server) -> None:
    url = f"{server.url}/v1"
    said = run(sys.executable, str(EXAMPLES / "stream.py"), "--base-url", url, "--dial", "0.5")
    assert "Paris" in said
    refused = run(sys.executable, str(EXAMPLES / "stream.py"), "--base-url", url, "--dial", "1")
    assert refused.strip()
    assert "Paris" not in refused


def test_curl_example_answers_refuses_streams_and_lists(server: Server) -> None:
    said = run("sh", str(EXAMPLES / "curl.sh"), server.url)
    assert said.count('"refusal_report"') == 3
    assert '"delta":{"content":null,"refusal":"' in said
    assert "data: [DONE]" in said
    assert '"refusal.category"' in said
