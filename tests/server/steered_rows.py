"""Requests, and batches of logits as vLLM's workers hand them to both processors."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.manifest import Manifest
from server.context import TURN_IDS_KEY
from server.generation.margins import MarginBoard, Margins, Ticket
from server.steering import SteeringV1, SteeringV2
from tests.toy import save_toy

VOCABULARY = 300
CATEGORIES = 5
MAX_REQUESTS = 16
# Opens a turn, as far as the server has told the worker.
TURN_ID = 150


class Served(NamedTuple):
    """A toy checkpoint and the config that a worker would see."""

    manifest: Manifest
    config: Any


def serve_toy(directory: Path) -> Served:
    """Makes a toy checkpoint."""
    manifest = save_toy(directory)
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(directory)),
        speculative_config=None,
        additional_config={TURN_IDS_KEY: [TURN_ID]},
    )
    return Served(manifest, config)


class Request:
    """One request of the reference: it decides once, for itself."""

    def __init__(
        self, rng: random.Random, *, steered: bool = True, rules: Sequence[Rule] = tuple(Rule)
    ) -> None:
        biases = [-math.inf, -2.0, 0.0, 0.5, 3.0, math.inf]
        self.controls = Controls(
            rule=rng.choice(rules),
            bias=tuple(rng.choice(biases) for _ in range(CATEGORIES)),
            selected=tuple(rng.random() < 0.5 for _ in range(CATEGORIES)),
        )
        self.steered = steered
        self.params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.5]),
            seed=rng.randrange(2**31),
            extra_args={EXTRA_ARGS_KEY: self.controls.to_wire()} if steered else None,
        )
        self.prompt_len = rng.randrange(3, 40)
        self.output: list[int] = []

    def reference(self, config: Any, row: torch.Tensor) -> int:
        """Decides in a batch of one."""
        return int(v1(config, self).apply(row.clone().unsqueeze(0)).argmax())


def v1(config: Any, *requests: Request) -> SteeringV1:
    """Returns the V1 processor with these requests in its batch."""
    processor = SteeringV1(config, torch.device("cpu"), is_pin_memory=False)
    added = [(i, request.params, None, request.output) for i, request in enumerate(requests)]
    processor.update_state(BatchUpdate(len(requests), [], added, []))
    return processor


class Row(NamedTuple):
    """One row of logits: whose it is, and how many tokens stand before the sampled one."""

    slot: int
    length: int


def context(rows: list[Row]) -> Any:
    """Builds vLLM's batch layout; rows of one slot must stand together."""
    slots = list(dict.fromkeys(row.slot for row in rows))
    bounds = [max(row.length for row in rows if row.slot == slot) for slot in slots]
    return SimpleNamespace(
        expanded_idx_mapping=torch.tensor([row.slot for row in rows], dtype=torch.int32),
        idx_mapping=torch.tensor(slots, dtype=torch.int32),
        idx_mapping_np=np.array(slots, dtype=np.int32),
        pos=torch.tensor([row.length - 1 for row in rows]),
        # vLLM pads them to the size of a CUDA graph.
        seq_lens_upper_bound_np=np.array([*bounds, 0, 0], dtype=np.int32),
    )


class V2:
    """The V2 processor with the part of vLLM's per-slot state that it reads."""

    def __init__(self, served: Served, *, drafts: int = 0) -> None:
        self.lengths = torch.zeros(MAX_REQUESTS, dtype=torch.int64)
        states: Any = SimpleNamespace(
            device=torch.device("cpu"),
            max_num_reqs=MAX_REQUESTS,
            prompt_len=SimpleNamespace(np=self.lengths.numpy(), gpu=self.lengths),
        )
        speculative = SimpleNamespace(num_speculative_tokens=drafts) if drafts else None
        config = SimpleNamespace(**{**vars(served.config), "speculative_config": speculative})
        self._processor = SteeringV2(config, states)  # type: ignore[arg-type]

    def admit(self, requests: dict[int, Request]) -> None:
        """Puts requests into slots."""
        for slot, request in requests.items():
            self.lengths[slot] = request.prompt_len
            self._processor.add_request(slot, request.params)
            self._processor.apply_staged_writes()

    def apply(self, before: torch.Tensor, *rows: Row) -> torch.Tensor:
        """Returns what one step makes of logits."""
        return self._processor.apply(before.clone(), context(list(rows)))

    def apply_kernel(self, before: torch.Tensor, *rows: Row) -> torch.Tensor:
        """Returns what the kernel of a GPU makes of the same step."""
        after, ctx = before.clone(), context(list(rows))
        self._processor._steer_greedily(after, ctx)
        return after


def logits(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCABULARY, generator=generator) * 3


def chosen(row: torch.Tensor) -> int:
    """Returns the one token that a decision row leaves open."""
    open_tokens = (row > -math.inf).nonzero().flatten().tolist()
    assert len(open_tokens) == 1
    return int(open_tokens[0])


def assert_text_row(before: torch.Tensor, after: torch.Tensor, manifest: Manifest) -> None:
    """Nothing but control tokens and what opens a turn changed, and these are masked."""
    expected = before.clone()
    expected[[*manifest.control_ids, TURN_ID]] = -math.inf
    assert torch.equal(after, expected)


def asking(request: Request, ticket: Ticket) -> None:
    assert request.params.extra_args is not None
    request.params.extra_args[EXTRA_ARGS_KEY]["ticket"] = list(ticket)


def expected_margins(row: torch.Tensor, manifest: Manifest) -> Margins:
    own = row[manifest.control_ids]
    margins = (own[:-1] - own[-1]).tolist()
    return Margins(float(row.logsumexp(0) - own[-1]), tuple(margins))


def assert_seen(board: MarginBoard, ticket: Ticket, row: torch.Tensor, manifest: Manifest) -> None:
    seen, expected = board.read(ticket), expected_margins(row, manifest)
    assert seen is not None
    assert seen.margins == expected.margins
    assert seen.log_normaliser == pytest.approx(expected.log_normaliser, abs=1e-5)
