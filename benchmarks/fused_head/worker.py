"""One way of computing the loss, in a process of its own."""

import importlib.util
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from loss.flexible import flexible_loss
from loss.fused import OutputLayer, fused_flexible_loss

Q, GAMMA = 0.7, 0.5
CROSS_ENTROPY, FLEXIBLE = "cross-entropy, all logits", "flexible, all logits"
FUSED, LIGER = "flexible, fused", "cross-entropy, Liger's fused"


class Shape(NamedTuple):
    """What is computed.

    Attributes:
        tokens: Rows of the hidden states, all of them learnt.
        chunk_tokens: Of the fused head, None for its own choice.
    """

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    chunk_tokens: int | None


class Batch(NamedTuple):
    """One problem.

    Attributes:
        hidden: `[tokens, hidden]`.
        weight: `[vocab, hidden]`.
        targets: `[tokens]`.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    token_weights: Tensor
    chunk_tokens: int | None


class Measurement(NamedTuple):
    """One forward and backward.

    Attributes:
        cpu_seconds: Of all threads.
        peak_bytes: Held at most, above what was held before.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def plain_cross_entropy(batch: Batch) -> Tensor:
    """Mean cross-entropy of all logits, as transformers computes it."""
    return functional.cross_entropy(
        functional.linear(batch.hidden, batch.weight).float(), batch.targets
    )


def plain_flexible(batch: Batch) -> Tensor:
    """Mean flexible loss of all logits."""
    logits = functional.linear(batch.hidden, batch.weight).float()
    log_probs = -functional.cross_entropy(logits, batch.targets, reduction="none")
    return flexible_loss(log_probs, Q, GAMMA).mean()


def fused_flexible(batch: Batch) -> Tensor:
    """The same, fused."""
    loss_sum, _ = fused_flexible_loss(
        batch.hidden,
        OutputLayer(batch.weight),
        batch.targets,
        batch.token_weights,
        Q,
        GAMMA,
        chunk_tokens=batch.chunk_tokens,
    )
    return loss_sum / len(batch.hidden)


def liger_cross_entropy(batch: Batch) -> Tensor:
    """Liger's fused cross-entropy, GPU only."""
    liger = importlib.import_module("liger_kernel.transformers")
    loss = liger.LigerFusedLinearCrossEntropyLoss()
    mean: Tensor = loss(batch.weight, batch.hidden, batch.targets)
    return mean


WAYS: dict[str, Callable[[Batch], Tensor]] = {
    CROSS_ENTROPY: plain_cross_entropy,
    FLEXIBLE: plain_flexible,
    FUSED: fused_flexible,
    LIGER: liger_cross_entropy,
}


def why_no_liger() -> str | None:
    """Returns why Liger cannot be measured here, None if it can."""
    if not torch.cuda.is_available():
        return "Liger is not measured: its kernels need a GPU, and there is none"
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger is not measured: `pip install liger-kernel` first"
    return None


def serve(way: str, shape: Shape, threads: int, orders: Connection) -> None:
    """Runs one way forward and backward for every order, in a process of its own.

    Answers each with a `Measurement`; ends at a None.
    """
    torch.set_num_threads(threads)
    batch = _batch(shape)
    # A GPU's allocator and kernels are set up by the size; a CPU only loads its libraries.
    warm = batch if batch.hidden.is_cuda else _batch(shape._replace(tokens=8, vocab=512))
    _measure(WAYS[way], warm)
    while orders.recv() is not None:
        orders.send(_measure(WAYS[way], batch))


def _batch(shape: Shape) -> Batch:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device).to(dtype)

    return Batch(
        normal(shape.tokens, shape.hidden).requires_grad_(),
        (normal(shape.vocab, shape.hidden) / shape.hidden**0.5).requires_grad_(),
        torch.randint(shape.vocab, (shape.tokens,), generator=draw, device=device),
        torch.ones(shape.tokens, device=device),
        shape.chunk_tokens,
    )


def _measure(loss: Callable[[Batch], Tensor], batch: Batch) -> Measurement:
    batch.hidden.grad = batch.weight.grad = None
    before = _reset_peak(batch.hidden)
    began, cpu_began = time.perf_counter(), time.process_time()
    loss(batch).backward()  # type: ignore[no-untyped-call]
    if batch.hidden.is_cuda:
        torch.cuda.synchronize()
    return Measurement(
        time.perf_counter() - began,
        time.process_time() - cpu_began,
        _peak(batch.hidden) - before,
    )


def _reset_peak(tensor: Tensor) -> int:
    """Forgets the high-water mark and returns the bytes that are held now."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def _peak(tensor: Tensor) -> int:
    return torch.cuda.max_memory_allocated() if tensor.is_cuda else _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: resident memory is read on Linux only")


class Worker:
    """The process of one way."""

    def __init__(self, way: str, shape: Shape, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(way, shape, threads, theirs))
        self._process.start()
        theirs.close()  # else a process that died would be waited for

    def measure(self) -> Measurement:
        """Runs one forward and backward."""
        self._orders.send("again")
        measurement: Measurement = self._orders.recv()
        return measurement

    def close(self) -> None:
        """Ends the process."""
        if self._process.is_alive():
            self._orders.send(None)
        self._process.join()
