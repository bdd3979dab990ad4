"""`rheostat demo`: from nothing to a turned dial."""

import json
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from models.errors import ConfigError
from training.config.recipe import load_config
from training.demo_data.render import render
from training.run.train import train
from training.serving import HOST, exit_on_sigterm, serving

SERVER_FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512"]
MODEL_NAME = "demo"
POSITIONS = (0.1, 0.5, 0.9)
SHOWN_CATEGORIES = ("safety", "indeterminate")
CANDIDATES = 40

Answer = dict[str, Any]


def run(checkpoint: Path, port: int, *, once: bool) -> None:
    """Trains the demo checkpoint where it is missing, serves it and turns two dials.

    Args:
        once: Whether to end after the show, rather than to keep serving.
    """
    console = Console()
    _check_port_is_free(port)
    exit_on_sigterm()
    config = load_config(Path("demo"))
    train(config, checkpoint, replace_stale=True)
    with _serving(checkpoint, port, console) as url:
        for category in SHOWN_CATEGORIES:
            console.print(_turn_one_dial(url, category, config.data.seed))
        console.print(_commands(url, once=once), soft_wrap=True, markup=False, highlight=False)
        if not once:
            _wait(console)


def _check_port_is_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port {port}: {error.strerror}; choose another with --port"
            ) from error


@contextmanager
def _serving(checkpoint: Path, port: int, console: Console) -> Iterator[str]:
    log = checkpoint.with_name(f"{checkpoint.name}-server.log")
    with ExitStack() as stack:
        with console.status(f"starting vLLM on http://{HOST}:{port} (its log: {log})"):
            url = stack.enter_context(serving(checkpoint, MODEL_NAME, log, SERVER_FLAGS, port))
        yield url


def _ask(url: str, prompt: str, refusal: dict[str, Any], max_tokens: int = 48) -> Answer:
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "refusal": {"report": True, **refusal},
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    response.raise_for_status()
    answer: Answer = response.json()["choices"][0]
    return answer


def _most_borderline(url: str, category: str, seed: int) -> str:
    prompts = [row["prompt"] for row in render(seed)["evaluation"] if row["category"] == category]

    def distance(prompt: str) -> float:
        decisions = _ask(url, prompt, {}, max_tokens=1)["refusal_report"]["decisions"]
        others = [d["margin"] for name, d in decisions.items() if name != category]
        return float(abs(decisions[category]["margin"]) + max(0.0, max(others) + 1))

    return min(prompts[:CANDIDATES], key=distance)


def _turn_one_dial(url: str, category: str, seed: int) -> Table:
    prompt = _most_borderline(url, category, seed)
    table = Table(title=f'"{prompt}"', title_justify="left", title_style="bold")
    table.add_column(f"{category} dial", justify="right")
    table.add_column("p(refuse) as trained", justify="right")
    table.add_column("decision")
    table.add_column("what the model says")
    for position in POSITIONS:
        answer = _ask(url, prompt, {"categories": {category: position}})
        report = answer["refusal_report"]
        table.add_row(
            f"{position}",
            f"{report['decisions'][category]['probability']:.2f}",
            f"refuse: {report['category']}" if report["refused"] else "respond",
            answer["message"]["refusal"] or answer["message"]["content"],
        )
    return table


def _commands(url: str, *, once: bool) -> str:
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "refusal": {"report": True, "categories": {"safety": 0.9, "indeterminate": "never"}},
    }
    curl = (
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body))}"
    )
    start = "With the server running (make demo), paste:" if once else "Paste in another terminal:"
    page = "" if once else f"\nOpen the page: {url}/\n"
    return f"{page}\n{start}\n\n{curl}\n\n{sys.executable} examples/chat.py --base-url {url}/v1\n"


def _wait(console: Console) -> None:
    console.print("Serving until Ctrl-C.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("stopping the server")
