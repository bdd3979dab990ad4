"""Score inputs, rendered and decided as vLLM's own routes would."""

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jinja2 import TemplateError
from pydantic import ValidationError

from models.errors import RequestError
from server.context import Decision, DecisionContext
from server.generation.prompts import TokenPrompt, token_prompt
from server.web.errors import Failure
from server.web.validation import first_problem

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.lora.request import LoRARequest


class ScoringEngine(Protocol):
    """What scoring needs of the engine.

    Attributes:
        client_error: Base of what vLLM raises where the client is at fault.
    """

    client_error: type[Exception]

    async def decide(
        self, prompt: object, context: DecisionContext, lora_request: "LoRARequest | None"
    ) -> Decision:
        """Returns the decision on one prompt."""

    def failure(self, error: "Exception | ErrorResponse") -> Failure:
        """Returns what vLLM's routes answer to an error of vLLM's."""


class Handlers(NamedTuple):
    """vLLM's handlers, which render, and the requests that they take."""

    chat: "OpenAIServingChat"
    chat_request: "type[ChatCompletionRequest]"
    completion: "OpenAIServingCompletion"
    completion_request: "type[CompletionRequest]"


class Rendered(NamedTuple):
    """A score input as the engine gets it."""

    prompt: TokenPrompt
    lora_request: "LoRARequest | None"


class VllmScorer:
    """Renders with vLLM's handlers, so that ids and decisions are those of vLLM's routes."""

    def __init__(self, engine: ScoringEngine, handlers: Handlers) -> None:
        self._engine = engine
        self._handlers = handlers
        self._mistakes = (engine.client_error, ValueError, TypeError, TemplateError)

    async def render(self, model: str | None, body: dict[str, Any]) -> Rendered:
        """Returns the rendered prompt and the adapter that ``model`` names, if any.

        Raises:
            RequestError: vLLM's routes would reject the body.
        """
        try:
            return await self._rendered({"model": model, **body})
        except ValidationError as error:
            raise first_problem(error.errors(), body) from error
        except self._mistakes as error:
            raise self._request_error(error) from error

    def tokens(self, rendered: Rendered) -> int:
        """Returns the length of a rendered prompt."""
        return len(rendered.prompt["prompt_token_ids"])

    async def decide(self, rendered: Rendered, context: DecisionContext) -> Decision:
        """Returns the decision on a rendered prompt.

        Raises:
            RequestError: It cannot be decided.
        """
        try:
            return await self._engine.decide(rendered.prompt, context, rendered.lora_request)
        except (self._engine.client_error, ValueError) as error:
            raise self._request_error(error) from error

    async def _rendered(self, body: dict[str, Any]) -> Rendered:
        chat, chat_request, completion, completion_request = self._handlers
        request: ChatCompletionRequest | CompletionRequest
        if "prompt" in body:
            request = completion_request.model_validate(body)
            prompts = await completion.render_completion_request(request)
        else:
            request = chat_request.model_validate(body)
            answer = await chat.render_chat_request(request)
            prompts = answer[1] if isinstance(answer, tuple) else answer
        if not isinstance(prompts, list):
            raise self._request_error(prompts)
        return Rendered(token_prompt(prompts[0]), chat._maybe_get_adapters(request))

    def _request_error(self, error: "Exception | ErrorResponse") -> RequestError:
        told = self._engine.failure(error)
        return RequestError(told.message, param=told.param, status=told.status, code=told.code)
