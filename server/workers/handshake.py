"""The handshake: each worker of each engine says which steering it runs, and the server compares.

An engine may run on another machine, of another release, with another checkpoint or without any
steering. Its answers would look like all others. So the server asks before it answers anybody.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from models.errors import ConfigError, shortened
from models.manifest import MANIFEST_NAME
from server.context import TURN_IDS_KEY
from server.generation.grammars import LIMIT_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What a worker says about itself, by the words of the error that a difference becomes. vLLM's
# messages carry it, so the values are texts, numbers and lists of them.
Answer: TypeAlias = Mapping[str, Any]

METHOD = "rheostat_steering"
# A worker answers between two steps, and at the start there are none. A busy machine is slow.
_LIMIT_S = 120.0
# Ranks of a pipeline that do not sample have no processors.
_PROCESSORS = "logits processors"
_ROOT = Path(__file__).parents[2]
# What decides, and what hands the numbers over.
_CODE = (
    *("models/controls.py", "models/decision.py", "models/manifest.py"),
    *("server/steering.py", "server/margin_rows.py", "server/generation/margins.py"),
)


class SteeredWorker:
    """Mixed into vLLM's worker class, on every rank: ``--worker-extension-cls``.

    Attributes:
        vllm_config: The worker's own, as its engine was started.
        model_runner: vLLM's, of either version.
    """

    vllm_config: "VllmConfig"
    model_runner: Any

    def rheostat_steering(self) -> Answer:
        """Returns what this worker runs."""
        v2 = self.vllm_config.use_v2_model_runner
        return {**_told(self.vllm_config), _PROCESSORS: _processors_of(self.model_runner, v2=v2)}


async def shake_hands(ask: Callable[..., Awaitable[Any]], config: "VllmConfig") -> None:
    """Asks every worker of every engine, and compares.

    Args:
        ask: Calls a method of each engine and returns their answers, in order.
        config: The server's own, steered (server/workers/config.py).

    Raises:
        ConfigError: A worker does not answer, or steers otherwise.
    """
    try:
        async with asyncio.timeout(_LIMIT_S):
            engines = await ask("collective_rpc", METHOD, None, (), None)
    except Exception as error:
        raise ConfigError(
            "an engine does not say which steering it runs, so it would answer unsteered: "
            f"{shortened(repr(error))}"
        ) from error
    check_answers(expected(config), engines)


def expected(config: "VllmConfig") -> Answer:
    """Returns what every worker has to answer that samples.

    Args:
        config: The server's own, steered.
    """
    named = [str(name) for name in config.model_config.logits_processors or ()]
    return {**_told(config), _PROCESSORS: [name.replace(":", ".") for name in named]}


def check_answers(expected: Answer, engines: Sequence[Sequence[Answer]]) -> None:
    """Compares what the workers answered.

    Args:
        expected: Of each worker.
        engines: By engine and worker.

    Raises:
        ConfigError: A worker steers otherwise, or none of an engine's samples.
    """
    for engine, workers in enumerate(engines):
        if all(answer.get(_PROCESSORS) is None for answer in workers):
            raise ConfigError(f"engine {engine} decides nothing: none of its workers samples")
        for rank, answer in enumerate(workers):
            _compare(expected, answer, f"worker {rank} of engine {engine}")


def _compare(expected: Answer, answer: Answer, who: str) -> None:
    for name, value in expected.items():
        found = answer.get(name)
        samples_not = name == _PROCESSORS and found is None
        if found != value and not samples_not:
            raise ConfigError(
                f"{who} steers otherwise than this server: its {name} is {found}, here it is "
                f"{value}. Start all engines by `rheostat serve` of one release, with the same "
                "checkpoint, flags and settings"
            )


def _told(config: "VllmConfig") -> dict[str, Any]:
    more: Any = config.additional_config
    manifest = Path(config.model_config.model) / MANIFEST_NAME
    return {
        "steering code": _code_hash(),
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "scheduler": str(config.scheduler_config.scheduler_cls),
        "ids that open a turn": more.get(TURN_IDS_KEY),
        "RHEOSTAT_MAX_GRAMMAR_S": more.get(LIMIT_KEY),
    }


@cache
def _code_hash() -> str:
    code = hashlib.sha256()
    for name in _CODE:
        code.update((_ROOT / name).read_bytes())
    return code.hexdigest()


def _processors_of(runner: Any, *, v2: bool) -> list[str] | None:
    if v2 and runner.sampler is None:
        return None
    processors = runner.sampler.logits_processors if v2 else runner.input_batch.logitsprocs.all
    # Another package's processor would run before ours and could change what is decided on.
    kinds = [type(processor) for processor in processors]
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    return [name for name in names if not name.startswith("vllm.")]
