"""A fake engine that decides as it is told, and calls of ``generate()`` on it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from models.controls import EXTRA_ARGS_KEY
from models.errors import RequestError
from server.context import DecisionContext
from server.generation.call import outputs_of
from server.generation.margins import MarginBoard, Ticket
from server.generation.outputs import Hider
from server.generation.seam import Call
from server.margin_rows import write_rows
from server.telemetry.recorder import MarginRecorder
from server.web.errors import Failure, failure
from tests.server.manifests import MANIFEST

SAFETY, HUMANIZING, RESPOND = 10, 11, 12
OPENING = [3, 4]
TEXT = 7
MARK = 20
# Opens a turn.
TURN = 21
PROMPT = {"type": "token", "prompt_token_ids": [1, 2, *OPENING]}


class FakeEngine:
    """Decides for safety, with the raw log-probabilities -1, -3 and -2; else writes one token.

    Args:
        recorder: Counts margins.
        silent: Whether it gives no output at all.
        distant: Whether its worker is on another machine.
        v2: Whether vLLM's V2 model runner works for it.
        answers: Whether it decides to respond.
        ends_with: Why its texts end.
    """

    def __init__(
        self,
        recorder: MarginRecorder | None = None,
        *,
        silent: bool = False,
        distant: bool = False,
        v2: bool = False,
        drafts: bool = False,
        answers: bool = False,
        ends_with: str = "stop",
    ) -> None:
        self.manifest = MANIFEST
        self.hider = Hider(MANIFEST, "mark")
        self.mark_id = MARK
        self.margin_board = MarginBoard(2)
        self.distant = distant
        self.margins_by_logprobs = v2
        self.drafts = drafts
        self.opens_with = RESPOND if answers else SAFETY
        self.ends_with = ends_with
        self.opening = OPENING
        self.turn_ids = frozenset({TURN})
        self.category_of = {SAFETY: 0, HUMANIZING: 1}
        self.repetition_penalty = 1.2
        self.bad_word_tokens = 1024
        self.text_ids: Callable[[str], list[int]] = lambda text: [TEXT + 1 for _ in text.split()]
        self.model_config: Any = SimpleNamespace(max_model_len=16)
        self.recorder = recorder
        self.silent = silent
        self.calls: list[tuple[list[int], Any, str]] = []

    def failure(self, error: Exception) -> Failure:
        return failure(500, str(error))

    async def generate_stock(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        ids = prompt["prompt_token_ids"]
        self.calls.append((ids, sampling_params, request_id))
        self.validate(sampling_params)
        if self.silent:
            return
        wire = (sampling_params.extra_args or {}).get(EXTRA_ARGS_KEY)
        tokens = [self.opens_with, TEXT] if wire else [TEXT]
        stopped = tokens[0] in (sampling_params.stop_token_ids or ())
        if wire and "ticket" in wire and not self.distant:
            ticket = Ticket(*wire["ticket"])
            raw = torch.tensor([[-1.0, -3.0, -2.0]])
            write_rows([ticket], torch.tensor([float(ticket.tag)]), torch.zeros(1), raw)
        logprobs = None
        if sampling_params.logprob_token_ids:
            values = {SAFETY: -1.0, HUMANIZING: -3.0, RESPOND: -2.0}
            step = {i: SimpleNamespace(logprob=value) for i, value in values.items()}
            logprobs = [] if self.drafts else [step]
        if request_id.endswith("-decision") or stopped:
            tokens = tokens[:1]
        choices = [
            SimpleNamespace(
                index=index,
                token_ids=list(tokens),
                logprobs=logprobs,
                cumulative_logprob=None,
                text="" if stopped else "No.",
                finish_reason="stop" if wire else self.ends_with,
                stop_reason=tokens[0] if stopped else None,
            )
            for index in range(sampling_params.n)
        ]
        yield SimpleNamespace(
            outputs=choices,
            finished=True,
            metrics=None,
            prompt=None,
            prompt_logprobs=None,
            prompt_token_ids=ids,
        )

    def decision_params(self, params: Any, *, choices: int, margins: bool) -> Any:
        ids = self.manifest.control_ids if margins else None
        return parameters(n=choices, logprob_token_ids=ids, temperature=params.temperature)

    def vllm_error(self, error: RequestError) -> Exception:
        return RequestError(error.message, param=error.param, status=error.status)

    def validate(self, params: Any) -> None:
        if max(params.allowed_token_ids or [0]) > TURN:
            raise ValueError("out of the vocabulary")

    async def merge(self, streams: Sequence[Any], params: Any) -> AsyncGenerator[Any, None]:
        for index, stream in enumerate(streams):
            async for output in stream:
                output.outputs[0].index = index
                yield output


def parameters(**changed: Any) -> Any:
    """Returns what stands for vLLM's ``SamplingParams``."""
    fields: dict[str, Any] = {
        "n": 1,
        "temperature": 0.0,
        "seed": None,
        "top_k": 0,
        "repetition_detection": None,
        "max_tokens": 5,
        "min_tokens": 0,
        "logit_bias": None,
        "allowed_token_ids": None,
        "stop_token_ids": None,
        "logprob_token_ids": None,
        "prompt_logprobs": None,
        "logprobs": None,
        "structured_outputs": None,
        "bad_words": [],
        "_bad_words_token_ids": None,
        "ignore_eos": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "thinking_token_budget": None,
        "skip_special_tokens": True,
        "stream_interval": None,
        "extra_args": None,
        "output_kind": SimpleNamespace(name="FINAL_ONLY"),
        "_all_stop_token_ids": set(),
    }
    return SimpleNamespace(**{**fields, **changed})


def streamed(**changed: Any) -> Any:
    """Returns parameters of an answer that is sent piece by piece."""
    return parameters(output_kind=SimpleNamespace(name="DELTA"), **changed)


def called(
    engine: FakeEngine, context: DecisionContext, params: Any = None, **options: Any
) -> Call:
    return Call(engine, context, 0, params or parameters(), "id", options)


def collected(call: Call, prompt: Any = PROMPT) -> list[list[int]]:
    async def collect() -> list[list[int]]:
        return [
            list(choice.token_ids)
            async for output in outputs_of(call, prompt)
            for choice in output.outputs
        ]

    return asyncio.run(collect())
