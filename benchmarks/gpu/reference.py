"""What the unmodified engine says about a prompt: the slow reference of every decision.

The log-probability of each control token is read as that of a prompt's last token, one request a
token: no processor, no bias and no batch of decisions takes part.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

from models.manifest import Manifest

AT_ONCE = 32


class Prompt(NamedTuple):
    """One prompt, and what the unmodified engine makes of it.

    Attributes:
        ids: As the chat template renders it, up to the decision step.
        margins: By category, from the prompt's own log-probabilities.
        texts: The greedy continuation of prompt and control token, by the token's id.
    """

    text: str
    ids: list[int]
    margins: dict[str, float]
    texts: dict[int, str]


class Stock:
    """The unmodified engine behind its own server.

    Args:
        tokens: Length of each continuation.
    """

    def __init__(self, http: httpx.Client, manifest: Manifest, tokens: int) -> None:
        self._http = http
        self._manifest = manifest
        self._tokens = tokens

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """Returns the reference of every text."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(self._prompt, texts))

    def texts_again(self, prompts: Sequence[Prompt]) -> list[dict[int, str]]:
        """Returns every continuation once more: how far the engine agrees with itself."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(lambda prompt: self._texts(prompt.ids), prompts))

    def _prompt(self, text: str) -> Prompt:
        turns = [{"role": "user", "content": text}]
        ids = self._post("/tokenize", {"messages": turns, "add_generation_prompt": True})["tokens"]
        found = {token: self._log_probability(ids, token) for token in self._manifest.control_ids}
        respond = found[self._manifest.respond.id]
        margins = {c.name: found[c.id] - respond for c in self._manifest.categories}
        return Prompt(text, ids, margins, self._texts(ids))

    def _log_probability(self, ids: list[int], token: int) -> float:
        answer = self._post(
            "/v1/completions", {"prompt": [*ids, token], "max_tokens": 1, "prompt_logprobs": 0}
        )
        (last,) = answer["choices"][0]["prompt_logprobs"][-1].items()
        assert int(last[0]) == token
        return float(last[1]["logprob"])

    def _texts(self, ids: list[int]) -> dict[int, str]:
        return {token: self._continuation([*ids, token]) for token in self._manifest.control_ids}

    def _continuation(self, ids: list[int]) -> str:
        body = {"prompt": ids, "max_tokens": self._tokens, "temperature": 0}
        text: str = self._post("/v1/completions", body)["choices"][0]["text"]
        return text

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._http.post(path, json={"model": "demo", **body})
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text[:500]}")
        return answer.json()


def decided(
    margins: Mapping[str, float], biases: Mapping[str, float], tolerance: float
) -> tuple[str | None, bool]:
    """Decides by the rule ``greedy``, in Python.

    Args:
        margins: By category, in manifest order.
        biases: By category; may be infinite.
        tolerance: What two computations of one margin may differ by.

    Returns:
        The refused category or None, and whether the tolerance could change it.
    """
    always = [name for name in margins if biases[name] == math.inf]
    if always:
        scores = {name: margins[name] for name in always}
    else:
        scores = {name: margins[name] + biases[name] for name in margins} | {"": 0.0}
    # The first of equals: refusals before the answer, in manifest order.
    best = max(scores, key=lambda name: scores[name])
    near = sum(scores[best] - score <= tolerance for score in scores.values()) > 1
    return best or None, near
