"""vLLM's own way from a body to the ids of its prompt, without an engine."""

import asyncio
import copy
from pathlib import Path
from typing import Any, get_args

from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.anthropic.protocol import AnthropicContentBlock, AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.tokenizers.registry import cached_tokenizer_from_config

from server.vllm_names import moved
from server.web.guard import Guard, build_guard, protected_tokens
from tests.toy import save_toy

REQUESTS: dict[str, Any] = {
    "chat": ChatCompletionRequest,
    "responses": ResponsesRequest,
    "messages": AnthropicMessagesRequest,
}
MM_PARSER_MAP = moved("MM_PARSER_MAP", "renderers.chat_utils.chat_message", "renderers.chat_utils")
PART_TYPES = {*MM_PARSER_MAP, *get_args(AnthropicContentBlock.model_fields["type"].annotation)}
# How vLLM fails at what it does not take: some parts it only finds out about by an accident.
REJECTIONS = (
    ValueError,
    VLLMValidationError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
)


class Rendering:
    """A toy checkpoint with a chat template, its guard, and vLLM's renderer for it.

    Attributes:
        guard: As the server has it.
        protected: The ids of the special tokens.
    """

    def __init__(self, directory: Path, template: str) -> None:
        manifest = save_toy(directory, template)
        config = ModelConfig(model=str(directory), hf_overrides={"max_position_embeddings": 2**16})
        self.tokenizer: Any = cached_tokenizer_from_config(config)
        self.protected = frozenset(protected_tokens(self.tokenizer, manifest))
        self.guard: Guard = build_guard(self.tokenizer, manifest)
        (self._mark,) = self.tokenizer.encode(self.guard.mark, add_special_tokens=False)
        renderer: Any = HfRenderer(VllmConfig(model_config=config), self.tokenizer)
        self._renderer = OnlineRenderer(
            config,
            renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )

    def ids(self, api: str, body: dict[str, Any]) -> list[int]:
        """Returns the prompt's ids, without the mark.

        Raises:
            VLLMValidationError: vLLM rejects the body; other errors of ``REJECTIONS`` say so too.
        """
        request = REQUESTS[api].model_validate(copy.deepcopy(body))
        ids = asyncio.run(self._rendered(api, request))
        return [token for token in ids if token != self._mark]

    def text(self, ids: list[int]) -> str:
        """Returns what ids spell."""
        text: str = self.tokenizer.decode(ids)
        return text

    def specials(self, ids: list[int]) -> list[str]:
        """Returns the special tokens among ids, in their order."""
        found: list[str] = self.tokenizer.convert_ids_to_tokens(
            [token for token in ids if token in self.protected]
        )
        return found

    async def _rendered(self, api: str, request: Any) -> Any:
        rendered: Any
        if api == "responses":
            rendered = await self._renderer.render_responses(request)
        else:
            if api == "messages":
                request = AnthropicServingMessages.to_chat_completion_request(request)
            rendered = await self._renderer.render_chat(request)
        if isinstance(rendered, ErrorResponse):
            raise ValueError(rendered.error.message)
        prompt = rendered.engine_input if api == "responses" else rendered[1][0]
        return prompt["prompt_token_ids"]
