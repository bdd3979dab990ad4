"""Answers with choices: chat, its batches, and completions."""

from typing import Any

from server.apis.verdicts import Verdicts

UNPARSED: dict[str, Any] = {"tool_calls": [], "function_call": None, "reasoning": None}


class ChoicesShape:
    """Shapes each choice by its own decision.

    A chat message has its text in ``refusal``. Where a choice is text, only the report says
    what it is.

    Args:
        verdicts: What was decided.
        echo: Whether the client asked for its own last message back.
    """

    def __init__(self, verdicts: Verdicts, *, echo: bool = False) -> None:
        self._verdicts = verdicts
        self._echo = echo
        self._reported: set[int] = set()
        self._categorised: set[int] = set()

    def answer(self, answer: dict[str, Any]) -> None:
        """Shapes a whole answer in place."""
        for choice in answer["choices"]:
            if "message" in choice:
                self._message(choice, choice["message"])
            self._report(choice)

    def event(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Shapes one chunk of a stream in place and returns it alone."""
        for choice in event["choices"]:
            if "delta" in choice:
                self._delta(choice, choice["delta"])
            self._report(choice)
        return [event]

    def _delta(self, choice: dict[str, Any], delta: dict[str, Any]) -> None:
        if delta.get("content") == "" and not self._verdicts.decided(choice["index"]):
            del delta["content"]  # the stream's first chunk, before the decision
        self._message(choice, delta)

    def _message(self, choice: dict[str, Any], message: dict[str, Any]) -> None:
        if self._echo and message.get("content"):
            message["content"] = self._verdicts.without_control_tokens(message["content"])
        index = choice["index"]
        category = self._verdicts.category(index)
        if category is None:
            return
        self._turn_into_refusal(choice, message)
        if index not in self._categorised:
            self._categorised.add(index)
            message["refusal_category"] = category

    def _turn_into_refusal(self, choice: dict[str, Any], message: dict[str, Any]) -> None:
        text = message.get("content")
        opens_stream = "delta" in choice and "role" in message
        if not self._echo and not opens_stream:
            said = self._verdicts.take_text(choice["index"])
            text = text if said is None else said
        for name in UNPARSED.keys() & message.keys():
            if "delta" in choice:
                del message[name]
            else:
                message[name] = UNPARSED[name]
        if (logprobs := choice.get("logprobs")) and "content" in logprobs:
            choice["logprobs"] = {**logprobs, "content": None, "refusal": logprobs["content"]}
        if choice.get("finish_reason") == "tool_calls":
            choice["finish_reason"] = "stop"
        if text is not None:
            message["refusal"] = text
            message["content"] = None

    def _report(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        if index in self._reported:
            return
        report = self._verdicts.report(index)
        if report is not None:
            self._reported.add(index)
            choice["refusal_report"] = report
