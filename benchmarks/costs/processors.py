"""Both logits processors in a step of 1 to 1,024 rows, of which none, one or all decide."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.manifest import load_manifest
from server.context import TURN_IDS_KEY
from server.steering import SteeringV1, SteeringV2

ROWS = (1, 8, 32, 128, 1024)
VOCABULARY = 32_768
PROMPT_LEN = 20
TURN_ID = 5

Step = Callable[[torch.Tensor], torch.Tensor]


class Case(NamedTuple):
    """One size of a step.

    Attributes:
        runner: vLLM's model runner, 1 or 2.
        deciding: How many rows are at their decision step.
    """

    runner: int
    rows: int
    deciding: int


def cases() -> list[Case]:
    """Returns every size."""
    return [
        Case(runner, rows, deciding)
        for runner in (1, 2)
        for rows in ROWS
        for deciding in dict.fromkeys((0, 1, rows))
    ]


class Batch:
    """One step of a batch, repeated.

    Args:
        checkpoint: Whose control tokens these are.
        case: Its size.
        device: Where the logits are.
        margins: Rows whose margins are written to shared memory, as tickets.
    """

    def __init__(
        self,
        checkpoint: Path,
        case: Case,
        device: str = "cpu",
        margins: tuple[tuple[str, int, int], ...] = (),
    ) -> None:
        self.case = case
        manifest = load_manifest(checkpoint)
        self.device = torch.device(device)
        rng = random.Random(0)
        self._params = [_params(rng, len(manifest.categories)) for _ in range(case.rows)]
        for params, ticket in zip(self._params, margins, strict=False):
            assert params.extra_args is not None
            params.extra_args[EXTRA_ARGS_KEY]["ticket"] = ticket
        self._config: Any = SimpleNamespace(
            model_config=SimpleNamespace(model=str(checkpoint)),
            speculative_config=None,
            additional_config={TURN_IDS_KEY: [TURN_ID]},
        )
        make = self._v1 if case.runner == 1 else self._v2
        self.prepare, self.step = make()

    def _v1(self) -> tuple[Callable[[], None], Step]:
        processor = SteeringV1(self._config, self.device, is_pin_memory=False)
        decided = range(self.case.deciding, self.case.rows)
        added = [(row, self._params[row], None, [1]) for row in decided]
        processor.update_state(BatchUpdate(self.case.rows, [], added, []))

        def prepare() -> None:
            new: Any = [(row, self._params[row], None, []) for row in range(self.case.deciding)]
            update = BatchUpdate(self.case.rows, [], new, []) if new else None
            processor.update_state(update)

        return prepare, processor.apply

    def _v2(self) -> tuple[Callable[[], None], Step]:
        rows = self.case.rows
        lengths = torch.full((rows,), PROMPT_LEN, dtype=torch.int64)
        states: Any = SimpleNamespace(
            device=self.device,
            max_num_reqs=rows,
            prompt_len=SimpleNamespace(np=lengths.numpy(), gpu=lengths.to(self.device)),
        )
        processor = SteeringV2(self._config, states)
        for slot, params in enumerate(self._params):
            processor.add_request(slot, params)
        processor.apply_staged_writes()
        ctx = self._context()

        def prepare() -> None:
            for slot in range(self.case.deciding):
                processor.add_request(slot, self._params[slot])
            processor.apply_staged_writes()

        return prepare, lambda logits: processor.apply(logits, ctx)

    def _context(self) -> Any:
        slots = np.arange(self.case.rows, dtype=np.int32)
        seen = np.where(slots < self.case.deciding, PROMPT_LEN, PROMPT_LEN + 5).astype(np.int32)
        on_device = torch.from_numpy(slots).to(self.device)
        return SimpleNamespace(
            expanded_idx_mapping=on_device,
            idx_mapping=on_device,
            idx_mapping_np=slots,
            pos=torch.from_numpy(seen - 1).to(self.device),
            seq_lens_upper_bound_np=seen,
        )


def _params(rng: random.Random, categories: int) -> SamplingParams:
    bias = tuple(rng.uniform(-8, 8) for _ in range(categories))
    controls = Controls(Rule.GREEDY, bias, (True,) * categories)
    return SamplingParams(temperature=0.0, extra_args={EXTRA_ARGS_KEY: controls.to_wire()})


def cpu_microseconds(checkpoint: Path, case: Case, steps: int) -> float:
    """Returns the median of a step: the news of the batch, and the logits."""
    batch = Batch(checkpoint, case)
    source = torch.randn(case.rows, VOCABULARY)
    logits = source.clone()
    taken = []
    for _ in range(steps + 2):
        logits.copy_(source)
        start = time.perf_counter()
        batch.prepare()
        batch.step(logits)
        taken.append(1e6 * (time.perf_counter() - start))
    return float(np.median(taken[2:]))
