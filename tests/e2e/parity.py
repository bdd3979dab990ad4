"""What an answer of Rheostat has to be, made of the answer of stock vLLM.

Stock gets the control token that Rheostat chose at the end of its prompt; its chat template prints
``control`` after the generation prompt. What it then answers is made into what a client of Rheostat
is to see: the control token is neither billed nor shown, and a refusal stands where the API has it.
"""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from models.manifest import ControlToken

VOLATILE = frozenset(
    {"id", "created", "created_at", "item_id", "call_id", "signature", "system_fingerprint"}
)
# Depends on what each server was asked before.
VOLATILE_COUNTS = frozenset({"cached_tokens", "sequence_number"})
CATEGORY = "refusal_category"
TEXT = frozenset({"content", "refusal", CATEGORY})
BILLED = frozenset({"prompt_tokens", "input_tokens", "total_tokens"})
# What several chunks of a stream say one after the other.
JOINED = frozenset(
    {"content", "refusal", "reasoning", "text", "delta", "thinking", "arguments", "partial_json"}
    | {"tokens", "token_logprobs", "top_logprobs", "text_offset", "logprobs", "token_ids"}
)


def with_control(body: dict[str, Any], controls: list[ControlToken]) -> dict[str, Any]:
    """Returns a body whose prompts end in their control tokens, for stock."""
    if "prompt" not in body:
        kwargs = {**body.get("chat_template_kwargs", {}), "control": controls[0].token}
        return {**body, "chat_template_kwargs": kwargs}
    prompt = body["prompt"]
    if isinstance(prompt, str):
        return {**body, "prompt": prompt + controls[0].token}
    if isinstance(prompt[0], int):
        return {**body, "prompt": [*prompt, controls[0].id]}
    if isinstance(prompt[0], str):
        return {**body, "prompt": [p + c.token for p, c in zip(prompt, controls, strict=True)]}
    return {**body, "prompt": [[*p, c.id] for p, c in zip(prompt, controls, strict=True)]}


def events_of(stream: str) -> list[dict[str, Any]]:
    lines = stream.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def without_volatile(node: Any) -> Any:
    if isinstance(node, list):
        return [without_volatile(value) for value in node]
    if not isinstance(node, dict):
        return node
    kept = {k: v for k, v in node.items() if k not in VOLATILE | VOLATILE_COUNTS}
    return {k: without_volatile(v) for k, v in kept.items()}


def without_control(node: Any, controls: list[ControlToken], hidden: int) -> Any:
    """Returns stock's answer as if the control tokens were not in its prompts.

    Args:
        node: The answer, or a part of it.
        controls: The tokens.
        hidden: How many of them stand in all prompts.
    """
    if isinstance(node, list):
        return [without_control(value, controls, hidden) for value in node]
    if not isinstance(node, dict):
        return node
    changed = {k: without_control(v, controls, hidden) for k, v in node.items()}
    for name in BILLED & node.keys():
        changed[name] = node[name] - hidden
    if isinstance(node.get("text"), str):  # of an echo
        for control in controls:
            changed["text"] = changed["text"].replace(control.token, "")
    ids = {control.id for control in controls}
    if isinstance(node.get("prompt_token_ids"), list):
        changed["prompt_token_ids"] = [t for t in node["prompt_token_ids"] if t not in ids]
    if isinstance(node.get("prompt_logprobs"), list):
        steps = node["prompt_logprobs"]
        changed["prompt_logprobs"] = [s for s in steps if not s or not _is_control(s, ids)]
    return changed


def _is_control(step: dict[str, Any], ids: set[int]) -> bool:
    return any(str(token) in step for token in ids)


def as_refusal(node: dict[str, Any], category: str) -> dict[str, Any]:
    """Returns what stands for one of stock's documents or events where it is a refusal."""
    if "choices" in node:
        return {**node, "choices": [_refused_choice(c, category) for c in node["choices"]]}
    kind = node.get("type", "")
    if node.get("object") == "response":
        return {**node, "output": [_refused_item(item, category) for item in node["output"]]}
    if kind.startswith("response."):
        return _refused_event(node, category)
    if kind == "message":
        blocks = [{**block, CATEGORY: category} for block in node["content"]]
        return {**_stopped(node, category), "content": blocks}
    if kind == "content_block_start":
        return {**node, "content_block": {**node["content_block"], CATEGORY: category}}
    if kind == "message_delta":
        return {**node, "delta": _stopped(node["delta"], category)}
    return node


def _stopped(message: dict[str, Any], category: str) -> dict[str, Any]:
    details = {"type": "refusal", "category": category, "explanation": None}
    return {**message, "stop_reason": "refusal", "stop_details": details}


def _refused_choice(choice: dict[str, Any], category: str) -> dict[str, Any]:
    changed = dict(choice)
    if (logprobs := choice.get("logprobs")) and "content" in logprobs:
        changed["logprobs"] = {**logprobs, "content": None, "refusal": logprobs["content"]}
    for name in {"message", "delta"} & choice.keys():
        text = choice[name].get("content")
        changed[name] = {**choice[name]}
        if text is not None:
            changed[name] |= {"content": None, "refusal": text}
        if "role" in choice[name]:  # a whole message, or the first chunk
            changed[name][CATEGORY] = category
    return changed


def _refused_item(item: dict[str, Any], category: str) -> dict[str, Any]:
    parts = [{"type": "refusal", "refusal": part["text"]} for part in item["content"]]
    return {**item, "content": parts, CATEGORY: category}


def _refused_event(event: dict[str, Any], category: str) -> dict[str, Any]:
    kind = event["type"].replace("output_text", "refusal")
    changed = {k: v for k, v in event.items() if k not in ("logprobs", "text")} | {"type": kind}
    if "text" in event:
        changed["refusal"] = event["text"]
    if "part" in event:
        changed["part"] = {"type": "refusal", "refusal": event["part"]["text"]}
    if "item" in event:
        changed["item"] = _refused_item(event["item"], category)
    if "response" in event:
        changed["response"] = as_refusal(event["response"], category)
    return changed


def folded(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins the chunks of a stream that differ only in what they add to the same text.

    Where one chunk ends and the next begins depends on how busy the machine is.
    """
    joined: list[dict[str, Any]] = []
    for event in sorted(events, key=_choice_index):
        if joined and _kind(joined[-1]) == _kind(event):
            joined[-1] = _join(joined[-1], event)
        else:
            joined.append(event)
    return joined


def _choice_index(event: dict[str, Any]) -> int:
    choices = event.get("choices")
    if choices is None:
        return 0
    return choices[0]["index"] if choices else len(json.dumps(event))


def _kind(event: dict[str, Any]) -> Any:
    # A parser may hold text back; which of its chunks are empty is no part of the answer.
    choices = [
        (choice["index"], sorted(k for k, v in choice.get("delta", {}).items() if v is not None))
        for choice in event.get("choices", [])
    ]
    choices = [(index, [k for k in names if k not in TEXT]) for index, names in choices]
    return event.get("type"), event.get("index"), choices


def _join(first: Any, second: Any, name: str = "") -> Any:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        return {k: _join(first.get(k), second.get(k), k) for k in keys}
    if isinstance(first, str) and isinstance(second, str) and name in JOINED:
        return first + second
    if isinstance(first, list) and isinstance(second, list):
        if name == "choices":
            return [_join(a, b) for a, b in zip(first, second, strict=True)]
        if name in JOINED:
            return first + second
    return first if second is None else second


def assert_same(ours: Any, theirs: Any, path: str = "") -> None:
    """Holds one JSON document to another, numbers with a fraction within rounding."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        assert len(ours) == len(theirs), (path, ours, theirs)
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{path}.{index}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-3), path
    else:
        assert ours == theirs, (path, ours, theirs)
