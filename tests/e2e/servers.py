"""Starting real servers for tests: bounded, on loopback, ended by their own process id."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import psutil
from openai import DefaultHttpxClient, OpenAI

from server.policies.credentials import hash_key

# The operator's key of every server that is started here.
OPERATOR_KEY = "the-operators-key-of-tests"
OPERATOR = {"authorization": f"Bearer {OPERATOR_KEY}"}
# Several servers start at once, and each imports vLLM three times.
START_LIMIT_S = 600
# Of one client's requests.
AT_ONCE = 16
ENGINE_FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512"]
ENGINE_FLAGS += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
PLUGIN = Path(__file__).with_name("first_sentence.py")
ENGINE_FLAGS += ["--reasoning-parser-plugin", str(PLUGIN), "--reasoning-parser", "first_sentence"]
# Stock answers after a control token where a request brings one.
CONTROL = "{%- if add_generation_prompt and control is defined -%}{{- control -}}{%- endif -%}"


def free_port() -> int:
    """Returns a port that the system gives to nobody else before a server takes it."""
    with socket.socket() as probe:
        while True:
            port = random.randrange(20_000, 32_000)  # below Linux's ephemeral ports
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def until(true: Callable[[], bool]) -> None:
    """Waits until something is true, for a while."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def http_client(url: str, **headers: str) -> httpx.Client:
    """Returns a client of a server on loopback, with a connection for each request.

    Args:
        url: The server's.
        headers: Of every request, with ``_`` for ``-``.
    """
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    # Reading the certificates would take longer than most requests.
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, headers=sent, timeout=120, verify=False, limits=limits)


class Post(NamedTuple):
    """A request with a body of JSON."""

    path: str
    body: Any
    headers: Mapping[str, str] = {}


class Server:
    """A process that answers HTTP on loopback, started at once; as a context, ready and ended.

    Attributes:
        port: Where it listens.
        url: Its address, without a path.
        http: A client of it.
        log: Where its output goes.
        process: Itself.

    Args:
        module: What runs as ``python -m``.
        arguments: Its own, beside the engine's flags and the port.
        log: Where its output goes.
        ready_path: Answers 200 once requests are served.
        variables: More environment variables.
        source: Another checkout of this project, whose server it is.
        engine_flags: vLLM's.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        log: Path,
        ready_path: str,
        variables: Mapping[str, str] | None = None,
        source: Path | None = None,
        engine_flags: Sequence[str] = tuple(ENGINE_FLAGS),
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = http_client(self.url)
        self.log = log
        self._ready_path = ready_path
        command = [sys.executable, "-m", module, *arguments]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *engine_flags]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        environment.update(variables or {})
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=source
            )

    def __enter__(self) -> Self:
        try:
            return self.wait_until_ready()
        except BaseException:
            self.end()
            raise

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait_until_ready(self) -> Self:
        """Returns the server once it serves requests.

        Raises:
            RuntimeError: The process ended or did not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if self.http.get(self._ready_path).status_code == 200:
                    return self
            time.sleep(0.25)
        raise RuntimeError(f"no server on {self.url}:\n{self.log.read_text()[-4000:]}")

    def post_all(self, posts: Sequence[Post], **headers: str) -> list[httpx.Response]:
        """Sends requests, many at once, and returns their answers in the same order.

        Args:
            posts: The requests.
            headers: Of each of them.
        """
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(
                threads.map(
                    lambda post: self.http.post(
                        post.path, json=post.body, headers={**headers, **post.headers}
                    ),
                    posts,
                )
            )

    def metrics(self) -> str:
        """Returns what Prometheus would read, with the operator's key."""
        answer = self.http.get("/metrics", headers=OPERATOR)
        answer.raise_for_status()
        return answer.text

    def metric(self, line: str) -> float:
        """Returns the sum of the metrics whose lines begin so."""
        lines = self.metrics().splitlines()
        return sum(float(each.rsplit(" ", 1)[1]) for each in lines if each.startswith(line))

    def openai(self) -> OpenAI:
        """Returns OpenAI's own client of the server."""
        http = DefaultHttpxClient(verify=False)
        url = f"{self.url}/v1"
        return OpenAI(base_url=url, api_key="none", max_retries=0, http_client=http)

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


def rheostat_server(
    checkpoint: Path,
    log: Path,
    *flags: str,
    variables: Mapping[str, str] | None = None,
    source: Path | None = None,
) -> Server:
    """Starts Rheostat with a checkpoint.

    Args:
        checkpoint: Its folder.
        log: Where the server's output goes.
        flags: More flags of vLLM's.
        variables: More environment variables.
        source: Another checkout of this project, whose server it is.
    """
    variables = {"RHEOSTAT_OPERATOR_KEY_HASH": hash_key(OPERATOR_KEY), **(variables or {})}
    model = str(checkpoint.resolve())
    arguments = ["serve", "--model", model, "--served-model-name", "demo", *flags]
    return Server("rheostat", arguments, log, "/readyz", variables, source)


def stock_server(checkpoint: Path, log: Path) -> Server:
    """Starts vLLM as it is with a checkpoint.

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
    return Server(module, arguments, log, "/health", variables)
