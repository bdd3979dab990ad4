"""Starting real servers for tests: bounded, on loopback, ended by their own process id."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from server.policies.credentials import hash_key

# The operator's key of every server that is started here.
OPERATOR_KEY = "the-operators-key-of-tests"
OPERATOR = {"authorization": f"Bearer {OPERATOR_KEY}"}
START_LIMIT_S = 240
ENGINE_FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512"]
ENGINE_FLAGS += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
PLUGIN = Path(__file__).with_name("first_sentence.py")
ENGINE_FLAGS += ["--reasoning-parser-plugin", str(PLUGIN), "--reasoning-parser", "first_sentence"]
# Stock answers after a control token where a request brings one.
CONTROL = "{%- if add_generation_prompt and control is defined -%}{{- control -}}{%- endif -%}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A process that answers HTTP on loopback."""

    def __init__(
        self,
        module: str,
        arguments: list[str],
        log: Path,
        variables: Mapping[str, str] | None = None,
        source: Path | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", module, *arguments]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *ENGINE_FLAGS]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        environment.update(variables or {})
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=source
            )

    def wait_until_ready(self, path: str) -> None:
        """Returns when ``path`` answers 200.

        Raises:
            RuntimeError: The process ended or did not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(self.url + path, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.25)
        raise RuntimeError(f"no server on {self.url}:\n{self.log.read_text()[-4000:]}")

    def metrics(self) -> str:
        """Returns what Prometheus would read, with the operator's key."""
        answer = httpx.get(self.url + "/metrics", headers=OPERATOR, timeout=10)
        answer.raise_for_status()
        return answer.text

    def end(self) -> None:
        """Asks the process to stop, kills it when it does not within 30 s, and its children.

        A stock server's engine process may outlive it.
        """
        if self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, left = psutil.wait_procs(children, timeout=10)
        for child in left:
            child.kill()


@contextmanager
def rheostat_server(
    checkpoint: Path,
    log: Path,
    *flags: str,
    variables: Mapping[str, str] | None = None,
    source: Path | None = None,
) -> Iterator[Server]:
    """Serves a checkpoint with Rheostat.

    Args:
        checkpoint: Its folder.
        log: Where the server's output goes.
        flags: More flags of vLLM's.
        variables: More environment variables.
        source: Another checkout of this project, whose server it is.
    """
    variables = {"RHEOSTAT_OPERATOR_KEY_HASH": hash_key(OPERATOR_KEY), **(variables or {})}
    arguments = [
        "serve",
        "--model",
        str(checkpoint.resolve()),
        "--served-model-name",
        "demo",
        *flags,
    ]
    server = Server("rheostat", arguments, log, variables, source)
    try:
        server.wait_until_ready("/readyz")
        yield server
    finally:
        server.end()


@contextmanager
def stock_server(checkpoint: Path, log: Path) -> Iterator[Server]:
    """Serves the same checkpoint with vLLM as it is.

    ``chat_template_kwargs: {"control": TOKEN}`` opens the answer with that token.
    """
    module = "vllm.entrypoints.launchers.api_server.entry"
    template = log.with_suffix(".jinja")
    # Grammars are followed by the same library, and forced calls by the tools' schemas.
    guidance = ["--structured-outputs-config.backend", "guidance"]
    guidance += ["--structured-outputs-config.disable_additional_properties", "true"]
    variables = {"VLLM_ENFORCE_STRICT_TOOL_CALLING": "0"}
    template.write_text((checkpoint / "chat_template.jinja").read_text() + CONTROL)
    arguments = ["--model", str(checkpoint), "--served-model-name", "demo"]
    arguments += ["--chat-template", str(template), *guidance]
    server = Server(module, arguments, log, variables)
    try:
        server.wait_until_ready("/health")
        yield server
    finally:
        server.end()
