"""Removes the control tokens from vLLM's outputs: ids, log-probabilities, prompt and counts."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from models.manifest import Manifest

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput

T = TypeVar("T")


class Hider:
    """Hides the control tokens of one checkpoint.

    Args:
        manifest: The served checkpoint's.
        mark: Text of the token with which server/web/guard.py breaks special tokens.
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

    def hide(self, output: "RequestOutput", visible: list[int]) -> None:
        """Hides them in an output, in place.

        Args:
            output: vLLM's; the control token that opened a choice is already dropped.
            visible: Returned by ``visible`` for the client's prompt.
        """
        if output.prompt_logprobs:  # it is empty in all deltas but the first
            ids = output.prompt_token_ids or ()
            output.prompt_logprobs = [
                step and without_ids(step, self.control_ids)
                for token, step in zip(ids, output.prompt_logprobs, strict=True)
                if token not in self.control_ids
            ]
        output.prompt_token_ids = visible
        if output.prompt is not None:
            for text in self._texts:
                output.prompt = output.prompt.replace(text, "")
            # Remove the mark last, or client-typed tokens would be removed too.
            output.prompt = output.prompt.replace(self._mark, "")
        for choice in output.outputs:
            if choice.logprobs is not None:
                choice.logprobs = [without_ids(step, self.control_ids) for step in choice.logprobs]


def without_ids(step: dict[int, T], ids: frozenset[int]) -> dict[int, T]:
    """Returns the alternatives of one step without some tokens; the same object where none is."""
    if ids.isdisjoint(step):
        return step
    return {token: value for token, value in step.items() if token not in ids}


def drop_first_token(choice: "CompletionOutput") -> None:
    """Drops the control token that opened a choice, in place.

    Its text needs no change: the detokenizer skips special tokens.
    """
    token = choice.token_ids[0]
    choice.token_ids = choice.token_ids[1:]
    if choice.logprobs is None:
        return
    if choice.cumulative_logprob is not None and (first := choice.logprobs[0].get(token)):
        choice.cumulative_logprob -= first.logprob
    choice.logprobs = choice.logprobs[1:]


def end_with(choice: "CompletionOutput", text: str) -> None:
    """Ends a choice with a fixed text, in place."""
    choice.text = text
    choice.finish_reason, choice.stop_reason = "stop", None


async def begin_with(
    prefix: str, stream: "AsyncGenerator[RequestOutput, None]", *, streamed: bool
) -> "AsyncGenerator[RequestOutput, None]":
    """Puts a prefix before the text of a stream's one choice.

    Args:
        prefix: In the prompt of the pass already.
        stream: Owned by the result.
        streamed: Whether each output holds only what is new.
    """
    begun = False
    async with aclosing(stream) as outputs:
        async for output in outputs:
            if not (begun and streamed):
                output.outputs[0].text = prefix + output.outputs[0].text
            begun = True
            yield output


async def merged(
    numbered: "AsyncGenerator[tuple[int, RequestOutput], None]", streams: int, *, delta: bool
) -> "AsyncGenerator[RequestOutput, None]":
    """Merges the streams of a request's choices, each of one choice, into its outputs.

    Args:
        numbered: The outputs of all streams as they come, with the index of their choice.
        streams: How many streams there are.
        delta: Whether each output holds only what is new; otherwise the whole answer is put out
            once, at the end.
    """
    latest: dict[int, RequestOutput] = {}
    finished: set[int] = set()
    async with aclosing(numbered) as outputs:
        async for index, output in outputs:
            output.outputs[0].index = index
            latest[index] = output
            if output.finished:
                finished.add(index)
            output.finished = len(finished) == streams
            if delta:
                yield output
    if not delta:
        whole = latest[0]
        whole.outputs = [latest[index].outputs[0] for index in sorted(latest)]
        whole.finished = True
        yield whole
