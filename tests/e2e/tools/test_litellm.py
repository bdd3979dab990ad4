"""LiteLLM's proxy before the server, with the configuration of docs/docker.md."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from server.policies.credentials import generate_key
from tests.e2e.servers import Server, free_port
from tests.e2e.tools.blocks import ROOT, python_of

pytestmark = pytest.mark.tools

START_LIMIT_S = 300
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
REFUSED = {"report": True, "categories": {"safety": "always"}}
ANSWERED = {"categories": {"safety": "never", "unsupported": "never", "humanizing": "never"}}


def configuration() -> str:
    page = (ROOT / "docs" / "docker.md").read_text()
    (block,) = re.findall(r"```yaml\n(model_list:.*?)```", page, re.DOTALL)
    return str(block).replace("openai/rheostat", "openai/demo")


@pytest.fixture(scope="module")
def proxy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("litellm")
    (folder / "litellm.yaml").write_text(configuration())
    key, port = f"sk-{generate_key()}", free_port()
    own = {"RHEOSTAT_URL": f"{server.url}/v1", "RHEOSTAT_KEY": "none", "LITELLM_MASTER_KEY": key}
    own |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HOME": str(folder)}
    command = [str(python_of("litellm").with_name("litellm")), "--config", "litellm.yaml"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"],
            cwd=folder,
            env={**os.environ, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_alive(process, url, folder / "log")
        yield OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_alive(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/liveliness").status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(log.read_text()[-4000:])


def ask(proxy: OpenAI, refusal: dict[str, Any]) -> Any:
    answer = proxy.chat.completions.create(
        model="rheostat", messages=QUESTION, max_tokens=16, extra_body={"refusal": refusal}
    )
    return answer.model_dump()["choices"][0]


def test_refusal_and_report_reach_the_client(proxy: OpenAI) -> None:
    choice = ask(proxy, REFUSED)
    assert choice["message"]["content"] is None
    assert choice["message"]["provider_specific_fields"]["refusal"]
    report = choice["provider_specific_fields"]["refusal_report"]
    assert (report["refused"], report["category"]) == (True, "safety")


def test_answer_reaches_the_client(proxy: OpenAI) -> None:
    assert ask(proxy, ANSWERED)["message"]["content"]


def test_streamed_refusal_reaches_the_client_in_content_only(proxy: OpenAI) -> None:
    def streamed(refusal: dict[str, Any]) -> str:
        events = proxy.chat.completions.create(
            model="rheostat",
            messages=QUESTION,
            max_tokens=16,
            stream=True,
            extra_body={"refusal": refusal},
        )
        return "".join(event.choices[0].delta.content or "" for event in events if event.choices)

    assert streamed({**REFUSED, "report": False, "refusal_in": ["refusal", "content"]})
    assert streamed({**REFUSED, "report": False}) == ""


def test_mistake_is_the_servers_own(proxy: OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(proxy, {"categories": {"nothing": 1}})
    assert caught.value.param == "refusal.categories.nothing"
