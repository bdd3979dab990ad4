"""Runs inside vLLM's engine: the decision, and the limit of what a request's grammar may cost.

The decision is a logits processor for each of vLLM's two model runners. Both do the same to a batch
of logits. At a steered request's decision step they mask every token but the one that
models/decision.py chooses. At all other steps they mask the control tokens and those that open a
turn, so that no text contains one.

This module and server/engine.py are the only ones that import vllm.
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from models.controls import EXTRA_ARGS_KEY, Rule, WireControls, dial_row
from models.decision import Dials, decide, uniform_draw
from models.manifest import load_manifest
from server.context import TURN_IDS_KEY
from server.generation.grammars import LIMIT_KEY
from server.generation.margins import Ticket
from server.huge_pages import collapse_memory
from server.margin_rows import write_rows

T = TypeVar("T")

NEVER_CHOSEN = float("-inf")
_MOST_KEPT = 128
# Time of a grammar's step that is not counted: more than ordinary steps take.
FREE_S = 0.01


def controls_of(params: SamplingParams) -> WireControls | None:
    """Returns a request's controls, or None for an unsteered one."""
    return (params.extra_args or {}).get(EXTRA_ARGS_KEY)


def ticket_of(controls: WireControls) -> Ticket | None:
    """Returns where to write a request's margins, or None if they are not wanted."""
    return Ticket(*controls["ticket"]) if "ticket" in controls else None


def _sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    # `torch.tensor` takes several times as long.
    host = torch.from_numpy(values)
    if device.type == "cpu":
        return host
    host = host.pin_memory() if is_pin_memory_available() else host
    return host.to(device, non_blocking=True)


def _table(rows: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(bytearray().join(rows), np.float32).reshape(len(rows), -1)


def _write_margins(
    tickets: Sequence[Ticket], log_normaliser: torch.Tensor, own: torch.Tensor
) -> None:
    tags = _sent(np.array([ticket.tag for ticket in tickets], np.float32), own.device)
    write_rows(tickets, tags, log_normaliser, own)


def _slot_table(columns: int, states: LogitsProcRequestState) -> Any:
    shape = (states.max_num_reqs, columns)
    if states.device.type == "cpu":  # no runner of vLLM's has slots there, but tests do
        table = torch.zeros(shape)
        return SimpleNamespace(np=table.numpy(), gpu=table, copy_to_uva=lambda: None)
    return UvaBackedTensor(shape, torch.float32)


def _row(controls: WireControls, params: SamplingParams) -> bytes:
    row = controls["row"]
    if controls["rule"] != Rule.SAMPLE:
        return row
    uniform = 0.0 if params.seed is None else uniform_draw(params.seed)
    drawn = np.array([params.temperature, uniform], np.float32).tobytes()
    return row[: -len(drawn)] + drawn


def _control_ids(vllm_config: VllmConfig, device: torch.device) -> torch.Tensor:
    manifest = load_manifest(Path(vllm_config.model_config.model))
    return torch.tensor(manifest.control_ids, dtype=torch.int64, device=device)


def _never_text(vllm_config: VllmConfig, controls: torch.Tensor) -> torch.Tensor:
    # A turn that opens inside an answer would be an undecided one.
    told: Any = vllm_config.additional_config
    return torch.cat((controls, controls.new_tensor(told[TURN_IDS_KEY])))


class _Undecided(NamedTuple):
    """A request of V1's batch before its decision."""

    row: bytes
    rule: int
    output_ids: list[int]
    ticket: Ticket | None


class _Deciding(NamedTuple):
    """The ``n`` rows of V1's batch that the next step decides.

    Attributes:
        rows: ``[n]`` int64.
        places: ``[n, k + 1]`` int64, the indices of their control tokens in the flat logits.
        dials: The rows' dials.
    """

    rows: torch.Tensor
    places: torch.Tensor
    dials: Dials


class SteeringV1(V1LogitsProcessor):
    """For vLLM's V1 model runner, where row i of the logits is request i of the batch.

    A request is undecided while its list of output tokens is empty. Only undecided requests cost
    anything on the host.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        collapse_memory()
        self._ids = _control_ids(vllm_config, device)
        self._never_text = _never_text(vllm_config, self._ids)
        self._chosen = torch.zeros((), device=device)
        self._undecided: dict[int, _Undecided] = {}
        # Batches repeat: a tenant's application sends the same dials with every request.
        self._lately = lru_cache(maxsize=_MOST_KEPT)(self._deciding)

    def is_argmax_invariant(self) -> bool:
        """The decision changes the largest logit."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests through the batch: removed, then added, then moved."""
        if batch_update is not None:
            self._follow(batch_update)
        decided = [index for index, request in self._undecided.items() if request.output_ids]
        for index in decided:
            del self._undecided[index]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Masks in place; ``logits`` is ``[requests, vocabulary]`` fp32."""
        if not self._undecided:
            return logits.index_fill_(1, self._never_text, NEVER_CHOSEN)
        requests = self._undecided.values()
        dial_rows = tuple(request.row for request in requests)
        rows, places, dials = self._lately(tuple(self._undecided), dial_rows, logits.shape[1])
        rules = {request.rule for request in requests}
        tickets = {i: r.ticket for i, r in enumerate(requests) if r.ticket is not None}
        own = logits.take(places)
        normaliser = None
        if tickets or Rule.PAPER in rules:
            normaliser = logits[rows].logsumexp(dim=-1)
        choice = decide(own, dials, rules, normaliser)
        if tickets and normaliser is not None:
            wanted = _sent(np.fromiter(tickets, np.int64), logits.device)
            _write_margins(list(tickets.values()), normaliser[wanted], own[wanted])
        logits.index_fill_(1, self._never_text, NEVER_CHOSEN)
        logits.index_fill_(0, rows, NEVER_CHOSEN)
        return logits.index_put_((rows, self._ids.take(choice)), self._chosen)

    def _deciding(
        self, indices: tuple[int, ...], dial_rows: tuple[bytes, ...], vocabulary: int
    ) -> _Deciding:
        device = self._ids.device
        rows = _sent(np.array(indices, np.int64), device)
        dials = Dials(_sent(_table(dial_rows), device), len(self._ids) - 1)
        return _Deciding(rows, rows.unsqueeze(1) * vocabulary + self._ids, dials)

    def _follow(self, update: BatchUpdate) -> None:
        for index in update.removed:
            self._undecided.pop(index, None)
        for index, params, _, output_ids in update.added:
            self._undecided.pop(index, None)
            controls = controls_of(params)
            if controls is not None and not output_ids:
                row, ticket = _row(controls, params), ticket_of(controls)
                self._undecided[index] = _Undecided(row, controls["rule"], output_ids, ticket)
        for source, target, direction in update.moved:
            self._move(source, target, direction)

    def _move(self, source: int, target: int, direction: MoveDirectionality) -> None:
        moving = self._undecided.pop(source, None)
        displaced = self._undecided.pop(target, None)
        if moving is not None:
            self._undecided[target] = moving
        if displaced is not None and direction is MoveDirectionality.SWAP:
            self._undecided[source] = displaced


class SteeringV2(V2LogitsProcessor):
    """For vLLM's V2 model runner, where rows belong to slots and are reordered every step.

    A row is a decision row when the token after it is the first after the prompt:
    ``pos + 1 == prompt_len``. ``prefill_len`` would be wrong for a request that was preempted.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        collapse_memory()
        device = req_states.device
        speculative = vllm_config.speculative_config
        self._drafts = speculative.num_speculative_tokens if speculative else 0
        self._ids = _control_ids(vllm_config, device)
        self._never_text = _never_text(vllm_config, self._ids)
        self._categories = len(self._ids) - 1
        self._prompt_len = req_states.prompt_len
        width = len(dial_row([0.0] * self._categories, [False] * self._categories, 0, 0, 0))
        # Written on the host; the device reads the lines that it needs through its bus.
        self._values = _slot_table(width + 1, req_states)
        self._staged = False
        self._steered = np.zeros(req_states.max_num_reqs, dtype=bool)
        self._rule = np.zeros(req_states.max_num_reqs, dtype=np.int64)
        self._tickets: dict[int, Ticket] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Overwrites the state of the slot's last request."""
        controls = controls_of(sampling_params)
        self._steered[req_idx] = controls is not None
        self._tickets.pop(req_idx, None)
        values = self._values.np[req_idx]
        values[-1] = controls is not None
        if controls is not None:
            ticket = ticket_of(controls)
            if ticket is not None:
                self._tickets[req_idx] = ticket
            self._rule[req_idx] = controls["rule"]
            values[:-1] = np.frombuffer(_row(controls, sampling_params), np.float32)
        self._staged = True
        return True

    def apply_staged_writes(self) -> None:
        """Shows the device the new slots' dials."""
        if self._staged:
            self._values.copy_to_uva()
            self._staged = False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Masks in place; ``logits`` is ``[rows, vocabulary]`` fp32."""
        rules = self._undecided_rules(ctx)
        if not rules:
            return logits.index_fill_(1, self._never_text, NEVER_CHOSEN)
        if self._tickets:
            self._give_margins(logits, ctx)
        if logits.is_cuda and rules == {Rule.GREEDY}:
            self._steer_greedily(logits, ctx)
        else:
            self._steer(logits, ctx, rules)
        return logits

    def _steer_greedily(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        # Triton would take a third of a second of the start on a CPU.
        from server.steering_kernel import steer_rows

        slots, lengths = ctx.expanded_idx_mapping, self._prompt_len.gpu
        values = self._values.gpu
        steer_rows(logits, slots, ctx.pos, lengths, values, self._ids, self._never_text)

    def _steer(self, logits: torch.Tensor, ctx: LogitsContext, rules: set[Rule]) -> None:
        slots = ctx.expanded_idx_mapping.long()
        values = self._values.gpu[slots]
        decides = (values[:, -1] > 0) & (ctx.pos + 1 == self._prompt_len.gpu[slots])
        normaliser = logits.logsumexp(dim=-1) if Rule.PAPER in rules else None
        dials = Dials(values, self._categories)
        choice = decide(logits[:, self._ids], dials, rules, normaliser)
        logits.index_fill_(1, self._never_text, NEVER_CHOSEN)
        logits.masked_fill_(decides.unsqueeze(1), NEVER_CHOSEN)
        chosen = torch.where(decides, 0.0, NEVER_CHOSEN)
        logits.scatter_(1, self._ids.take(choice).unsqueeze(1), chosen.unsqueeze(1))

    def _give_margins(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        slots, lengths = _slots_and_lengths(ctx)
        deciding = slots[lengths == self._prompt_len.np[slots]].tolist()
        found = {slot: self._tickets.pop(slot) for slot in deciding if slot in self._tickets}
        if not found:
            return
        wanted = _sent(np.fromiter(found, np.int64), logits.device)
        # A request has one row before its decision. Under drafts the host cannot tell which.
        rows = logits[(ctx.expanded_idx_mapping == wanted.unsqueeze(1)).int().argmax(dim=1)]
        _write_margins(list(found.values()), rows.logsumexp(dim=-1), rows[:, self._ids])

    def _undecided_rules(self, ctx: LogitsContext) -> set[Rule]:
        slots, lengths = _slots_and_lengths(ctx)
        # The bound counts drafts that may be rejected, so it can only be too large by them.
        undecided = self._steered[slots] & (lengths <= self._prompt_len.np[slots] + self._drafts)
        return {Rule(int(rule)) for rule in np.unique(self._rule[slots[undecided]])}


def _slots_and_lengths(ctx: LogitsContext) -> tuple[np.ndarray, np.ndarray]:
    # With CUDA graphs vLLM pads the lengths to the size of a graph, but not the slots.
    slots = ctx.idx_mapping_np
    return slots, ctx.seq_lens_upper_bound_np[: len(slots)]


class PricedGrammar(StructuredOutputGrammar):
    """A grammar that ends its request once its steps have taken too long.

    vLLM follows grammars between the steps of its batch, so all requests wait for the slowest.

    Args:
        grammar: The backend's.
        limit_s: Thread time of all its steps together, ``FREE_S`` of each not counted.
    """

    def __init__(self, grammar: StructuredOutputGrammar, limit_s: float) -> None:
        self._grammar = grammar
        self._left_s = limit_s

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Returns False, which ends the request, once the grammar took too long or gave up."""
        # llguidance would end the text as if it were complete.
        if self._left_s <= 0 or getattr(self._grammar, "printed_error", False):
            return False
        return self._counted(self._grammar.accept_tokens, request_id, tokens)

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """Returns the drafts that the grammar accepts."""
        return self._counted(self._grammar.validate_tokens, tokens) if self._left_s > 0 else []

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        """Masks a row, unless the grammar took too long: then the request ends next."""
        if self._left_s > 0:
            self._counted(self._grammar.fill_bitmask, bitmask, batch_index)

    def rollback(self, num_tokens: int) -> None:
        """Goes back."""
        self._grammar.rollback(num_tokens)

    def is_terminated(self) -> bool:
        """Whether its text is complete."""
        return self._grammar.is_terminated()

    def reset(self) -> None:
        """Goes back to the start."""
        self._grammar.reset()  # type: ignore[no-untyped-call]

    def _counted(self, step: Callable[..., T], *arguments: Any) -> T:
        started_s = time.thread_time()
        try:
            return step(*arguments)
        finally:
            self._left_s -= max(0.0, time.thread_time() - started_s - FREE_S)


def _price(scheduler: Scheduler, output: SchedulerOutput) -> None:
    if not output.has_structured_output_requests:
        return
    settings: Any = scheduler.vllm_config.additional_config
    for request_id in output.num_scheduled_tokens:
        request = scheduler.requests.get(request_id)
        asked = request.structured_output_request if request is not None else None
        if asked is None or isinstance(asked.grammar, PricedGrammar):
            continue
        if isinstance(asked.grammar, StructuredOutputGrammar):
            asked.grammar = PricedGrammar(asked.grammar, settings[LIMIT_KEY])


class SteeredScheduler(Scheduler):
    """vLLM's scheduler, with a limit to what a grammar costs other requests."""

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Returns vLLM's own masks."""
        _price(self, scheduler_output)
        return super().get_grammar_bitmask(scheduler_output)


class SteeredAsyncScheduler(AsyncScheduler):
    """The same for the scheduler that prepares a step while the last one runs."""

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Returns vLLM's own masks."""
        _price(self, scheduler_output)
        return super().get_grammar_bitmask(scheduler_output)
