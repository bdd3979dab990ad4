"""One of two processes that shard a tiny model and compare its fused loss with the plain one.

`tests/training/model/test_fused_head.py` starts it with its rank, a file where the two meet, and
the ways of sharding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.training.model.test_fused_head import Batch, _model
from training.model.fused_head import FusedHead


def _sharded(way: str, model: Any) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    for layer in model.model.layers:
        fully_shard(layer)
    if way == "fsdp2-head":
        fully_shard(model.lm_head)
    fully_shard(model)
    return model  # type: ignore[no-any-return]


def _gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """This process's part of each gradient."""
    torch.autograd.backward(loss)
    parts: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            parts[name] = getattr(gradient, "to_local", lambda whole=gradient: whole)().clone()
    # Not between forward and backward: FSDP2's parameters are others there.
    model.zero_grad()
    return parts


def _compare(way: str) -> None:
    model, batch = _model(), Batch()
    head = FusedHead(model)
    wrapped = _sharded(way, model)
    # Each process has a row of its own.
    row = slice(dist.get_rank(), dist.get_rank() + 1)
    for name in ("ids", "targets", "weights", "q", "gamma"):
        setattr(batch, name, getattr(batch, name)[row])
    wanted = batch.plain(wrapped)
    expected = _gradients(wrapped, wanted.loss_sum)
    found = batch.fused(head, wrapped)
    gradients = _gradients(wrapped, found.loss_sum)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert any(gradient.any() for gradient in expected.values())
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


def compare_in_process(rank: int, meeting: str, ways: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for way in ways:
        _compare(way)
    dist.destroy_process_group()
