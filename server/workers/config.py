"""What vLLM's engines are told: the same on every rank and every machine.

vLLM hands its configuration to the processes that it starts itself, Ray's included. An engine on
another machine is started by a command of its own (``--headless``), which tells it the same.
"""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from models.checkpoint import turn_opening_ids
from server.context import TURN_IDS_KEY
from server.generation.grammars import LIMIT_KEY
from server.settings import Settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

EXTENSION = "server.workers.handshake.SteeredWorker"


def steer_workers(config: "VllmConfig", settings: Settings, tokenizer: Any) -> None:
    """Has vLLM's engines load server/steering.py, and tells that what it needs, in place."""
    interface = "SteeringV2" if config.use_v2_model_runner else "SteeringV1"
    config.model_config.logits_processors = [f"server.steering:{interface}"]
    config.additional_config = {
        **additional(config),
        LIMIT_KEY: settings.max_grammar_s,
        TURN_IDS_KEY: sorted(turn_opening_ids(tokenizer) - _ending_ids(config.model_config)),
    }
    kind = "Async" if config.scheduler_config.async_scheduling else ""
    config.scheduler_config.scheduler_cls = f"server.steering.Steered{kind}Scheduler"
    config.parallel_config.worker_extension_cls = EXTENSION


def put_into_flags(config: "VllmConfig", args: Namespace) -> None:
    """Writes what ``steer_workers`` did into flags, from which vLLM makes a configuration anew.

    Args:
        config: Steered.
        args: Changed in place.
    """
    args.logits_processors = config.model_config.logits_processors
    args.additional_config = additional(config)
    args.scheduler_cls = config.scheduler_config.scheduler_cls
    args.worker_extension_cls = config.parallel_config.worker_extension_cls


def additional(config: "VllmConfig") -> dict[str, Any]:
    """Returns the place for what vLLM itself does not read."""
    assert isinstance(config.additional_config, dict)  # vLLM's flag takes nothing else
    return config.additional_config


def answers_at_once(config: "VllmConfig") -> int:
    """Returns how many answers this server's engines work on at once."""
    of = config.parallel_config
    engines = of.data_parallel_size_local if of.local_engines_only else of.data_parallel_size
    return int(config.scheduler_config.max_num_seqs * engines)


def _ending_ids(model: "ModelConfig") -> set[int | None]:
    # What ends an answer is never masked, even if it opens a turn.
    ends = model.try_get_generation_config().get("eos_token_id")
    more = getattr(model.hf_text_config, "eos_token_id", None)
    return {end for ids in (ends, more) for end in (ids if isinstance(ids, list) else [ids])}
