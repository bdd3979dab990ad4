"""`rheostat demo`: from nothing to a model whose dials turn."""

import asyncio
import json
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from models.calibration import list_calibrations
from models.errors import ConfigError
from models.files import parse_yaml
from training.client import Reply, RheostatClient, Scores, Settings, client_of
from training.data.rows import Message, Row
from training.serving import HOST, exit_on_sigterm, serving

MODEL_NAME = "demo"
POSITIONS = (0.1, 0.5, 0.9)
RATES = (0.1, 0.5, 0.9)
CANDIDATES = 40
SHOWN_CHARACTERS = 110

Prompts = Mapping[str, Sequence[str]]


class Model(NamedTuple):
    """What the demo serves.

    Attributes:
        folder: The checkpoint's default folder.
        make: Makes the checkpoint where it is missing.
        prompts: By category, what the shown prompt is chosen from.
        length: Of the longest conversation, in tokens.
    """

    folder: Path
    make: Callable[[Path], object]
    prompts: Callable[[], Prompts]
    length: int


def _build(out: Path) -> object:
    from training.published.build import build

    return build("smollm2", out)


def _train(out: Path) -> object:
    from training.config.recipe import load_config
    from training.run.train import train

    return train(load_config(Path("demo")), out, replace_stale=True)


def written_prompts() -> Prompts:
    """Returns what is chosen from where the model is a real one, by category."""
    source = Path(__file__).parent / "demo_data" / "shown.yaml"
    prompts: Prompts = parse_yaml(source.read_text(encoding="utf-8"), str(source))
    return prompts


def _rendered_prompts() -> Prompts:
    from training.demo_data.render import render

    prompts: dict[str, list[str]] = {}
    for row in render(0)["evaluation"]:
        if row["category"] is not None:
            prompts.setdefault(row["category"], []).append(row["prompt"])
    return {category: found[:CANDIDATES] for category, found in prompts.items()}


REAL = Model(Path("checkpoints/smollm2"), _build, written_prompts, 2048)
TINY = Model(Path("checkpoints/demo"), _train, _rendered_prompts, 512)


def run(checkpoint: Path | None, port: int, *, once: bool, tiny: bool = False) -> None:
    """Makes the demo's checkpoint where it is missing, serves it and turns its dials.

    Args:
        checkpoint: Its folder; None for the default.
        once: Whether to end after the show, rather than to keep serving.
        tiny: Whether to train and serve the model of two million parameters, which knows the
            demo's small world only.
    """
    console = Console()
    model = TINY if tiny else REAL
    folder = checkpoint or model.folder
    _check_port_is_free(port)
    exit_on_sigterm()
    with console.status(f"making {folder}"):
        model.make(folder)
    with _serving(folder, model, port, console) as url:
        asyncio.run(_show(url, model.prompts(), console, rates=bool(list_calibrations(folder))))
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
def _serving(checkpoint: Path, model: Model, port: int, console: Console) -> Iterator[str]:
    log = checkpoint.with_name(f"{checkpoint.name}-server.log")
    flags = ["--enforce-eager", "--dtype", "float32", "--max-model-len", str(model.length)]
    with ExitStack() as stack:
        with console.status(f"starting vLLM on http://{HOST}:{port} (its log: {log})"):
            url = stack.enter_context(serving(checkpoint, MODEL_NAME, log, flags, port))
        yield url


async def _show(url: str, prompts: Prompts, console: Console, *, rates: bool) -> None:
    async with client_of(url) as client:
        names = await client.categories()
        scores = await _scores(client, [p for name in names for p in prompts[name]], names)
        chosen = {
            name: min(prompts[name], key=partial(_distance, scores, at))
            for at, name in enumerate(names)
        }
        replies = await asyncio.gather(
            *(
                _ask(client, prompt, Settings({name: position}))
                for name, prompt in chosen.items()
                for position in POSITIONS
            )
        )
        console.print(_dials(chosen, replies))
        if rates:
            console.print(await _rates(client, prompts))


def _row(prompt: str) -> Row:
    turns = (Message(role="user", content=prompt), Message(role="assistant", content=""))
    return Row(turns, None, None, "the demo's prompts")


async def _scores(
    client: RheostatClient, prompts: Sequence[str], names: Sequence[str]
) -> dict[str, Scores]:
    found: dict[str, Scores] = {}

    def keep(places: Sequence[int], scores: Sequence[Scores]) -> None:
        found.update(zip((prompts[place] for place in places), scores, strict=True))

    await client.score([_row(prompt) for prompt in prompts], names, keep)
    return found


def _distance(scores: Mapping[str, Scores], at: int, prompt: str) -> float:
    """Returns how far a prompt is from being decided by one category's dial alone."""
    margins = scores[prompt].margins
    others = [margin for place, margin in enumerate(margins) if place != at]
    return abs(margins[at]) + max(0.0, max(others) + 1)


async def _ask(client: RheostatClient, prompt: str, settings: Settings) -> Reply:
    return await client.ask(MODEL_NAME, (Message(role="user", content=prompt),), settings)


def _dials(chosen: Mapping[str, str], replies: Sequence[Reply]) -> Table:
    table = Table(title="One prompt a category, its dial at three positions", title_justify="left")
    for column in ("prompt", "dial", "decision", "what the model says"):
        table.add_column(column)
    answers = iter(replies)
    for name, prompt in chosen.items():
        for position in POSITIONS:
            reply = next(answers)
            first, last = position == POSITIONS[0], position == POSITIONS[-1]
            table.add_row(
                prompt if first else "",
                f"{name}={position}",
                f"refuse: {reply.category}" if reply.category else "respond",
                shorten(reply.text, SHOWN_CHARACTERS, placeholder=" …"),
                end_section=last,
            )
    return table


async def _rates(client: RheostatClient, prompts: Prompts) -> Table:
    table = Table(title="Refused of the demo's prompts, by the rate asked for")
    table.add_column("category")
    for rate in RATES:
        table.add_column(f"rate {rate:.0%}", justify="right")
    for name, asked in prompts.items():
        counts = []
        for rate in RATES:
            # The decision is enough.
            settings = Settings({name: {"rate": rate}}, max_new_tokens=1)
            replies = await asyncio.gather(*(_ask(client, prompt, settings) for prompt in asked))
            counts.append(sum(reply.category == name for reply in replies))
        table.add_row(name, *(f"{count} of {len(asked)}" for count in counts))
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
