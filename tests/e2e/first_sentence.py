"""A reasoning parser for a model that has no marks of thought; vLLM loads it as a plugin."""

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser, ReasoningParserManager

END = "."


class FirstSentence(ReasoningParser):
    """Takes the first sentence for a thought where ``chat_template_kwargs.thinking`` is set."""

    def __init__(
        self,
        tokenizer: Any,
        *arguments: Any,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, *arguments, **options)
        self._thinks = bool((chat_template_kwargs or {}).get("thinking"))
        self._end_id = self.vocab[END]

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Returns whether these ids hold the end of a thought."""
        return not self._thinks or self._end_id in input_ids

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """Returns the ids after the thought."""
        if not self._thinks:
            return input_ids
        found = self._end_id in input_ids
        return input_ids[input_ids.index(self._end_id) + 1 :] if found else []

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Returns the thought and the rest of a whole text."""
        if not self._thinks:
            return None, model_output
        thought, end, rest = model_output.partition(END)
        return thought + end, rest or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """Returns what a piece of text adds to the thought and to the rest."""
        if not self._thinks or END in previous_text:
            return DeltaMessage(content=delta_text)
        thought, end, rest = delta_text.partition(END)
        return DeltaMessage(reasoning=thought + end, content=rest or None)


ReasoningParserManager.register_module("first_sentence", module=FirstSentence)
