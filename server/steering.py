"""The decision inside vLLM's workers: one logits processor for each of its two model runners.

Both do the same to a batch of logits: at a steered request's decision step every token is masked
but the one that models/decision.py chooses; at all other steps the control tokens are masked, so
that none ever stands inside a text.

This module and server/engine.py are the only ones that import vllm.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from models.controls import EXTRA_ARGS_KEY, Rule, WireControls
from models.decision import Dials, decide, dial_row, uniform_draw
from models.manifest import load_manifest
from server.margin_rows import write_rows
from server.margins import Ticket

NEVER_CHOSEN = float("-inf")


def controls_of(params: SamplingParams) -> WireControls | None:
    """Returns the controls that the engine put into a request, or None for an unsteered one."""
    return (params.extra_args or {}).get(EXTRA_ARGS_KEY)


def ticket_of(controls: WireControls) -> Ticket | None:
    """Returns where a request's margins go, or None when nobody asks for them."""
    return Ticket(*controls["ticket"]) if "ticket" in controls else None


def _sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    # `torch.tensor` takes several times as long for the same.
    host = torch.from_numpy(values)
    if device.type == "cpu":
        return host
    host = host.pin_memory() if is_pin_memory_available() else host
    return host.to(device, non_blocking=True)


def _floats(rows: Sequence[Sequence[float]]) -> np.ndarray:
    with np.errstate(over="ignore"):  # a bias beyond fp32 is infinite
        return np.array(rows, np.float32)


@lru_cache(maxsize=256)
def _dials(rows: tuple[tuple[float, ...], ...], categories: int, device: torch.device) -> Dials:
    # Batches repeat: a tenant's application sends the same dials with every request.
    return Dials(_sent(_floats(rows), device), categories)


class _Asking:
    """The rows of a batch whose margins are asked for; made when the batch changes.

    Args:
        tickets: By row of the logits slice that is decided on.
        device: Where the logits are.
    """

    def __init__(self, tickets: dict[int, Ticket], device: torch.device) -> None:
        self._tickets = list(tickets.values())
        self._rows = _sent(np.fromiter(tickets, np.int64), device)
        tags = np.array([ticket.tag for ticket in self._tickets], np.float32)
        self._tags = _sent(tags, device)

    def write(self, log_normaliser: torch.Tensor, own: torch.Tensor) -> None:
        rows = self._rows
        write_rows(self._tickets, self._tags, log_normaliser[rows], own[rows])


def _row(controls: WireControls, params: SamplingParams) -> tuple[float, ...]:
    bias, selected, rule = controls["bias"], controls["selected"], controls["rule"]
    if rule != Rule.SAMPLE:
        return tuple(dial_row(bias, selected, rule, 0.0, 0.0))
    uniform = 0.0 if params.seed is None else uniform_draw(params.seed)
    return tuple(dial_row(bias, selected, rule, params.temperature, uniform))


def _control_ids(vllm_config: VllmConfig, device: torch.device) -> torch.Tensor:
    manifest = load_manifest(Path(vllm_config.model_config.model))
    return torch.tensor(manifest.control_ids, dtype=torch.int64, device=device)


class _Undecided(NamedTuple):
    """A request of V1's batch before its decision."""

    row: tuple[float, ...]
    rule: Rule
    output_ids: list[int]
    ticket: Ticket | None


class SteeringV1(V1LogitsProcessor):
    """For vLLM's V1 model runner, where row i of the logits is request i of the batch.

    A request is undecided while its list of output tokens is empty. Only undecided requests cost
    anything on the host, and only in the steps that they join, leave or move.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._ids = _control_ids(vllm_config, device)
        self._categories = len(self._ids) - 1
        self._undecided: dict[int, _Undecided] = {}
        self._rows: torch.Tensor | None = None
        self._asking: _Asking | None = None
        self._dials: Dials | None = None
        self._rules: set[Rule] = set()

    def is_argmax_invariant(self) -> bool:
        """The decision changes the largest logit."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests through the batch: removed, then added, then moved."""
        changed = batch_update is not None and self._follow(batch_update)
        decided = [index for index, request in self._undecided.items() if request.output_ids]
        for index in decided:
            del self._undecided[index]
        if changed or decided:
            self._rebuild()

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Masks in place; ``logits`` is ``[requests, vocabulary]`` fp32."""
        if self._rows is None or self._dials is None:
            return logits.index_fill_(1, self._ids, NEVER_CHOSEN)
        rows = self._rows
        own = logits.index_select(1, self._ids).index_select(0, rows)
        normaliser = None
        if self._asking is not None or Rule.PAPER in self._rules:
            normaliser = logits[rows].logsumexp(dim=-1)
        choice = decide(own, self._dials, self._rules, normaliser)
        if self._asking is not None and normaliser is not None:
            self._asking.write(normaliser, own)
        logits.index_fill_(1, self._ids, NEVER_CHOSEN)
        logits.index_fill_(0, rows, NEVER_CHOSEN)
        logits[rows, self._ids.take(choice)] = 0.0
        return logits

    def _follow(self, update: BatchUpdate) -> bool:
        before = set(self._undecided)
        for index in update.removed:
            self._undecided.pop(index, None)
        for index, params, _, output_ids in update.added:
            self._undecided.pop(index, None)
            controls = controls_of(params)
            if controls is not None and not output_ids:
                row, rule = _row(controls, params), Rule(controls["rule"])
                self._undecided[index] = _Undecided(row, rule, output_ids, ticket_of(controls))
        for source, target, direction in update.moved:
            self._move(source, target, direction)
        return bool(before or self._undecided)

    def _move(self, source: int, target: int, direction: MoveDirectionality) -> None:
        moving = self._undecided.pop(source, None)
        displaced = self._undecided.pop(target, None)
        if moving is not None:
            self._undecided[target] = moving
        if displaced is not None and direction is MoveDirectionality.SWAP:
            self._undecided[source] = displaced

    def _rebuild(self) -> None:
        if not self._undecided:
            self._rows = self._dials = self._asking = None
            return
        device = self._ids.device
        requests = self._undecided.values()
        tickets = {row: r.ticket for row, r in enumerate(requests) if r.ticket is not None}
        self._asking = _Asking(tickets, device) if tickets else None
        self._rows = _sent(np.fromiter(self._undecided, np.int64), device)
        self._dials = _dials(tuple(r.row for r in requests), self._categories, device)
        self._rules = {request.rule for request in requests}


class SteeringV2(V2LogitsProcessor):
    """For vLLM's V2 model runner, where rows belong to slots and are reordered every step.

    A row is a decision row when the token after it is the first after the prompt:
    ``pos + 1 == prompt_len``. ``prefill_len`` would be wrong for a request that was preempted.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        device = req_states.device
        speculative = vllm_config.speculative_config
        self._drafts = speculative.num_speculative_tokens if speculative else 0
        self._ids = _control_ids(vllm_config, device)
        self._categories = len(self._ids) - 1
        self._prompt_len = req_states.prompt_len
        self._width = len(dial_row([0.0] * self._categories, [False] * self._categories, 0, 0, 0))
        self._values = torch.zeros(req_states.max_num_reqs, self._width + 1, device=device)
        self._steered = np.zeros(req_states.max_num_reqs, dtype=bool)
        self._rule = np.zeros(req_states.max_num_reqs, dtype=np.int64)
        self._staged: dict[int, tuple[float, ...]] = {}
        self._tickets: dict[int, Ticket] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Overwrites everything that the slot's last request left."""
        controls = controls_of(sampling_params)
        self._steered[req_idx] = controls is not None
        row = (0.0,) * self._width
        self._tickets.pop(req_idx, None)
        if controls is not None:
            ticket = ticket_of(controls)
            # A draft's rows cannot be told from the decision's on the host; its margins are asked
            # for once more.
            if ticket is not None and not self._drafts:
                self._tickets[req_idx] = ticket
            self._rule[req_idx] = controls["rule"]
            row = _row(controls, sampling_params)
        self._staged[req_idx] = (*row, float(controls is not None))
        return True

    def apply_staged_writes(self) -> None:
        """Sends the new slots' dials to the device in one copy that does not wait for it."""
        if not self._staged:
            return
        device = self._values.device
        slots = _sent(np.fromiter(self._staged, np.int64), device)
        block = _sent(_floats(list(self._staged.values())), device)
        self._values.index_copy_(0, slots, block)
        self._staged.clear()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Masks in place; ``logits`` is ``[rows, vocabulary]`` fp32."""
        rules = self._undecided_rules(ctx)
        if not rules:
            return logits.index_fill_(1, self._ids, NEVER_CHOSEN)
        slots = ctx.expanded_idx_mapping.long()
        values = self._values[slots]
        decides = (values[:, -1] > 0) & (ctx.pos + 1 == self._prompt_len.gpu[slots])
        own = logits[:, self._ids]
        asking = self._asking(ctx)
        normaliser = None
        if asking is not None or Rule.PAPER in rules:
            normaliser = logits.logsumexp(dim=-1)
        choice = decide(own, Dials(values, self._categories), rules, normaliser)
        if asking is not None and normaliser is not None:
            asking.write(normaliser, own)
        logits.index_fill_(1, self._ids, NEVER_CHOSEN)
        logits.masked_fill_(decides.unsqueeze(1), NEVER_CHOSEN)
        chosen = torch.where(decides, 0.0, NEVER_CHOSEN)
        logits.scatter_(1, self._ids.take(choice).unsqueeze(1), chosen.unsqueeze(1))
        return logits

    def _asking(self, ctx: LogitsContext) -> _Asking | None:
        if not self._tickets:
            return None
        slots = ctx.idx_mapping_np
        deciding = ctx.seq_lens_upper_bound_np == self._prompt_len.np[slots]
        found = {
            int(row): self._tickets.pop(int(slots[row]), None) for row in deciding.nonzero()[0]
        }
        tickets = {row: ticket for row, ticket in found.items() if ticket is not None}
        return _Asking(tickets, self._ids.device) if tickets else None

    def _undecided_rules(self, ctx: LogitsContext) -> set[Rule]:
        slots = ctx.idx_mapping_np
        # The bound counts drafts that may be rejected, so it can only be too large by them.
        lengths = self._prompt_len.np[slots] + self._drafts
        undecided = self._steered[slots] & (ctx.seq_lens_upper_bound_np <= lengths)
        return {Rule(int(rule)) for rule in np.unique(self._rule[slots[undecided]])}
