"""Taking the control tokens out of vLLM's outputs: ids, log-probabilities, prompt and counts.

The outputs are vLLM's ``RequestOutput`` and ``CompletionOutput``; this module imports no vllm, so
it takes them as they are.
"""

from typing import Any

from models.manifest import Manifest


class Hider:
    """Hides the control tokens of one checkpoint.

    Args:
        manifest: The served checkpoint's.
        mark: What server/web/guard.py breaks special tokens with.
    """

    def __init__(self, manifest: Manifest, mark: str) -> None:
        self._mark = mark
        self.control_ids = frozenset(manifest.control_ids)
        self._texts = [control.token for control in manifest.control_tokens]

    def visible(self, ids: list[int]) -> list[int]:
        """Returns a prompt's ids without control tokens; the same list where it has none."""
        if self.control_ids.isdisjoint(ids):
            return ids
        return [token for token in ids if token not in self.control_ids]

    def hide(self, output: Any, visible: list[int]) -> None:
        """Hides them in a ``RequestOutput``, in place.

        Args:
            output: The output; the control token that opened a choice is already dropped.
            visible: What ``visible`` returned for the client's prompt.
        """
        if output.prompt_logprobs:  # an empty list stands in all deltas but the first
            output.prompt_logprobs = [
                self._without(step)
                for token, step in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
                if token not in self.control_ids
            ]
        output.prompt_token_ids = visible
        if output.prompt is not None:
            for text in self._texts:
                output.prompt = output.prompt.replace(text, "")
            # Last: what a client typed is broken by it, and stays.
            output.prompt = output.prompt.replace(self._mark, "")
        for choice in output.outputs:
            if choice.logprobs is not None:
                choice.logprobs = [self._without(step) for step in choice.logprobs]

    def _without(self, step: dict[int, Any] | None) -> dict[int, Any] | None:
        if step is None or self.control_ids.isdisjoint(step):
            return step
        return {token: value for token, value in step.items() if token not in self.control_ids}


def drop_first_token(choice: Any) -> None:
    """Drops the control token that opened a ``CompletionOutput``, in place.

    Its text needs no change: the detokenizer skips special tokens.
    """
    token = choice.token_ids[0]
    choice.token_ids = choice.token_ids[1:]
    if choice.logprobs is None:
        return
    if choice.cumulative_logprob is not None and (first := choice.logprobs[0].get(token)):
        choice.cumulative_logprob -= first.logprob
    choice.logprobs = choice.logprobs[1:]
