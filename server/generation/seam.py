"""What one call of ``generate()`` needs of the engine, and the call itself.

Prompts, sampling parameters and outputs are vLLM's own objects. This package imports no vLLM when
it runs: what must be made of vLLM's classes, the engine makes.
"""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from models.errors import RequestError
from models.manifest import Manifest
from server.context import DecisionContext
from server.generation.margins import MarginBoard
from server.generation.outputs import Hider
from server.generation.prompts import TokenPrompt
from server.telemetry.recorder import MarginRecorder
from server.web.errors import Failure

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

Outputs: TypeAlias = "AsyncGenerator[RequestOutput, None]"
TextIds: TypeAlias = Callable[[str], list[int]]


class Engine(Protocol):
    """What a call needs of the engine.

    Attributes:
        manifest: The served checkpoint's.
        hider: Removes the control tokens from outputs.
        opening: Ids that the chat template puts in front of every decision step.
        turn_ids: Ids that open a turn, which no answer may hold.
        category_of: Index of each refusal token's category, by id.
        mark_id: Id of the token with which server/web/guard.py breaks special tokens.
        recorder: Counts the margins of a share of the requests.
        margin_board: Where the worker writes margins.
        margins_by_logprobs: Whether a decision pass may ask for the log-probabilities of the
            control tokens without changing the answers of other requests in its batch.
        repetition_penalty: The penalty of requests that name none.
        text_ids: Returns a text's token ids.
        bad_word_tokens: How many tokens of ``bad_words`` the workers have room for.
        model_config: vLLM's.
    """

    manifest: Manifest
    hider: Hider
    opening: list[int]
    turn_ids: frozenset[int]
    category_of: dict[int, int]
    mark_id: int
    recorder: MarginRecorder | None
    margin_board: MarginBoard
    margins_by_logprobs: bool
    repetition_penalty: float
    text_ids: TextIds
    bad_word_tokens: int
    model_config: "ModelConfig"

    def generate_stock(
        self,
        prompt: TokenPrompt,
        sampling_params: "SamplingParams",
        request_id: str,
        **options: Any,
    ) -> Outputs:
        """Generates without any decision of ours."""

    def decision_params(
        self, params: "SamplingParams", *, choices: int, margins: bool
    ) -> "SamplingParams":
        """Returns the parameters of a decision pass: one token, the client's temperature and seed.

        Args:
            params: The request's own.
            choices: How many are decided.
            margins: Whether to ask for the raw log-probabilities of the control tokens.
        """

    def validate(self, params: "SamplingParams") -> None:
        """Raises vLLM's error for parameters that it would reject."""

    def merge(self, streams: Sequence[Outputs], params: "SamplingParams") -> Outputs:
        """Merges the streams of a request's choices into its outputs."""

    def vllm_error(self, error: RequestError) -> Exception:
        """Returns the error of vLLM's whose HTTP answer says the same."""

    def failure(self, error: Exception) -> Failure:
        """Returns what vLLM's routes answer to an error of vLLM's."""


class Call:
    """One call of ``generate()``.

    Args:
        engine: Runs it.
        context: Shared with the HTTP layer, and by all calls of the HTTP request.
        number: Of this call within the HTTP request, from 0.
        params: The client's; owned by the call.
        request_id: vLLM's, unique.
        options: The other arguments of ``generate()``.

    Attributes:
        started_s: Start of the call, by the monotonic clock.
        streamed: Whether each output holds only what is new.
        texts: The fixed refusal texts, by the id of the refusal token: the policy's, and the
            checkpoint's own where it does not keep the token in the context and has no prefix for a
            generated text.
    """

    def __init__(
        self,
        engine: Engine,
        context: DecisionContext,
        number: int,
        params: "SamplingParams",
        request_id: str,
        options: dict[str, Any],
    ) -> None:
        self.engine = engine
        self.context = context
        self.number = number
        self.params = params
        self.request_id = request_id
        self.options = options
        self.started_s = time.monotonic()
        self.streamed = params.output_kind.name == "DELTA"
        self.texts: dict[int, str] = {}
        categories = engine.manifest.categories
        if not engine.manifest.kept:
            self.texts = {c.id: c.refusal_text for c in categories if c.refusal_prefix is None}
        if context.texts:
            texts = zip(categories, context.texts, strict=True)
            self.texts |= {category.id: text for category, text in texts if text is not None}

    def stock(self, prompt: TokenPrompt, params: "SamplingParams", suffix: str = "") -> Outputs:
        """Generates without any decision of ours.

        Args:
            prompt: Of this pass.
            params: Of this pass; owned by the engine from here on.
            suffix: Makes the request id of this pass unique.
        """
        request_id = f"{self.request_id}{suffix}"
        return self.engine.generate_stock(prompt, params, request_id, **self.options)


class CheckedPrompt(NamedTuple):
    """A prompt that was checked.

    Attributes:
        rendered: vLLM's, without the guard's marks.
        ids: Its token ids.
        decided: Those of them that the decision sees.
    """

    rendered: TokenPrompt
    ids: list[int]
    decided: list[int]
