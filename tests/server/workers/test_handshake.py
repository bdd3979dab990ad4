"""What workers say about their steering, and which of it a server accepts."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.errors import ConfigError
from models.manifest import MANIFEST_NAME
from server.context import TURN_IDS_KEY
from server.generation.grammars import LIMIT_KEY
from server.workers.handshake import METHOD, Answer, SteeredWorker, expected, shake_hands

PROCESSOR = "server.steering:SteeringV1"


class SteeringV1:
    """Stands for ours."""

    __module__ = "server.steering"


class Foreign:
    """Stands for another package's, which vLLM loads first."""

    __module__ = "another.package"


class MinTokens:
    """Stands for vLLM's own."""

    __module__ = "vllm.v1.sample"


def config(folder: Path, *, v2: bool = False, limit_s: float = 1.0, manifest: str = "{}") -> Any:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_NAME).write_text(manifest)
    return SimpleNamespace(
        use_v2_model_runner=v2,
        model_config=SimpleNamespace(model=str(folder), logits_processors=[PROCESSOR]),
        scheduler_config=SimpleNamespace(scheduler_cls="server.steering.SteeredScheduler"),
        additional_config={TURN_IDS_KEY: [1, 2], LIMIT_KEY: limit_s},
    )


def worker(config: Any, *processors: object, samples: bool = True) -> SteeredWorker:
    found = SteeredWorker()
    found.vllm_config = config
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(logitsprocs=SimpleNamespace(all=processors)),
        sampler=SimpleNamespace(logits_processors=list(processors)) if samples else None,
    )
    found.model_runner = runner
    return found


def shake(config: Any, engines: Sequence[Sequence[SteeredWorker]]) -> None:
    async def ask(utility: str, method: str, *_: object) -> list[list[Answer]]:
        assert (utility, method) == ("collective_rpc", METHOD)
        return [[one.rheostat_steering() for one in workers] for workers in engines]

    asyncio.run(shake_hands(ask, config))


@pytest.mark.parametrize("v2", [False, True])
def test_workers_that_steer_as_the_server_are_accepted(tmp_path: Path, v2: bool) -> None:
    ours = config(tmp_path, v2=v2)
    steered = worker(ours, MinTokens(), SteeringV1())
    shake(ours, [[steered, steered], [steered, steered]])
    assert expected(ours) == steered.rheostat_steering()


@pytest.mark.parametrize(
    ("processors", "found"),
    [((), r"\[\]"), ((Foreign(), SteeringV1()), "another.package.Foreign")],
)
@pytest.mark.parametrize("v2", [False, True])
def test_other_processors_are_refused(
    tmp_path: Path, processors: tuple[object, ...], found: str, v2: bool
) -> None:
    ours = config(tmp_path, v2=v2)
    engines = [[worker(ours, SteeringV1())], [worker(ours, MinTokens(), *processors)]]
    with pytest.raises(
        ConfigError, match=f"worker 0 of engine 1 .* logits processors is .*{found}"
    ):
        shake(ours, engines)


def test_ranks_of_a_pipeline_that_do_not_sample_need_no_processor(tmp_path: Path) -> None:
    ours = config(tmp_path, v2=True)
    first, last = worker(ours, samples=False), worker(ours, SteeringV1())
    shake(ours, [[first, last]])
    with pytest.raises(ConfigError, match="engine 0 decides nothing"):
        shake(ours, [[first, first]])


def test_another_checkpoint_or_setting_is_named(tmp_path: Path) -> None:
    ours = config(tmp_path / "ours")
    for theirs, name in (
        (config(tmp_path / "theirs", manifest='{"version": 2}'), "manifest"),
        (config(tmp_path / "ours", limit_s=2.0), "RHEOSTAT_MAX_GRAMMAR_S is 2.0, here it is 1.0"),
    ):
        with pytest.raises(ConfigError, match=name):
            shake(ours, [[worker(theirs, SteeringV1())]])


def test_engine_without_our_extension_is_refused_in_one_line(tmp_path: Path) -> None:
    async def ask(*_: object) -> object:
        raise Exception(f"'Worker' object has no attribute '{METHOD}'")

    with pytest.raises(ConfigError, match=r"^an engine does not say which steering .*[^\n]$"):
        asyncio.run(shake_hands(ask, config(tmp_path)))
