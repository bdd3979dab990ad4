import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from server.generation.outputs import Hider, drop_first_token, merged
from tests.server.manifests import MANIFEST

SAFETY, HUMANIZING, RESPOND = MANIFEST.control_ids


def logprob(value: float) -> Any:
    return SimpleNamespace(logprob=value)


def output(**fields: Any) -> Any:
    empty: dict[str, Any] = {
        "prompt_logprobs": None,
        "prompt_token_ids": [],
        "prompt": None,
        "outputs": [],
    }
    return SimpleNamespace(**{**empty, **fields})


def choice(ids: list[int], **fields: Any) -> Any:
    return SimpleNamespace(
        **{"token_ids": ids, "logprobs": None, "cumulative_logprob": None, **fields}
    )


def test_prompt_without_control_tokens_is_not_copied() -> None:
    ids = [900, 901]
    assert Hider(MANIFEST, "mark").visible(ids) is ids


def test_prompt_loses_its_control_tokens_in_ids_text_and_log_probabilities() -> None:
    hider = Hider(MANIFEST, "mark")
    ids = [900, RESPOND, 901, SAFETY, 902]
    steps = [None, {RESPOND: 1}, {901: 2, SAFETY: 3}, {SAFETY: 4}, {902: 5}]
    shown = output(
        prompt_token_ids=ids,
        prompt_logprobs=steps,
        prompt=f"a{MANIFEST.respond.token}b{MANIFEST.categories[0].token}c",
    )
    hider.hide(shown, hider.visible(ids))
    assert shown.prompt_token_ids == [900, 901, 902]
    assert shown.prompt_logprobs == [None, {901: 2}, {902: 5}]
    assert shown.prompt == "abc"


def test_text_that_a_client_typed_is_shown_as_it_was_typed() -> None:
    hider = Hider(MANIFEST, "mark")
    shown = output(prompt_token_ids=[900], prompt="[markrespond] [respond]x")
    hider.hide(shown, [900])
    assert shown.prompt == "[respond] x"


def test_alternatives_lose_their_control_tokens() -> None:
    kept = {900: 1, 901: 2}
    shown = choice([900, 901], logprobs=[kept, {901: 3, HUMANIZING: 4}])
    Hider(MANIFEST, "mark").hide(output(outputs=[shown]), [])
    assert shown.logprobs[0] is kept
    assert shown.logprobs[1] == {901: 3}


def test_first_token_is_dropped_with_its_log_probability() -> None:
    steps = [{RESPOND: logprob(-0.5)}, {900: logprob(-1.0)}]
    shown = choice([RESPOND, 900], logprobs=steps, cumulative_logprob=-1.5)
    ids = shown.token_ids
    drop_first_token(shown)
    assert shown.token_ids == [900]
    assert shown.logprobs == steps[1:]
    assert shown.cumulative_logprob == -1.0
    assert ids == [RESPOND, 900], "the engine's own list is not touched"


def test_first_token_is_dropped_where_no_log_probabilities_were_asked_for() -> None:
    shown = choice([RESPOND], cumulative_logprob=0.0)
    drop_first_token(shown)
    assert shown.token_ids == []


def test_later_deltas_have_no_prompt_log_probabilities_to_hide() -> None:
    shown = output(prompt_token_ids=[900, RESPOND], prompt_logprobs=[])
    Hider(MANIFEST, "mark").hide(shown, [900])
    assert shown.prompt_logprobs == []
    assert shown.prompt_token_ids == [900]


async def outputs(*texts: str) -> AsyncGenerator[Any, None]:
    for place, text in enumerate(texts):
        choice = SimpleNamespace(index=0, text=text)
        yield SimpleNamespace(outputs=[choice], finished=place == len(texts) - 1)


async def numbered(*streams: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Yields one output of each stream in turn."""
    left = dict(enumerate(streams))
    while left:
        for index, stream in list(left.items()):
            try:
                yield index, await anext(stream)
            except StopAsyncIteration:
                del left[index]


def collect(*streams: Any, delta: bool) -> list[Any]:
    async def collected() -> list[Any]:
        return [
            ([(choice.index, choice.text) for choice in output.outputs], output.finished)
            async for output in merged(numbered(*streams), len(streams), delta=delta)
        ]

    return asyncio.run(collected())


def test_whole_choices_are_merged_into_one_output_in_order() -> None:
    assert collect(outputs("a"), outputs("b"), outputs("c"), delta=False) == [
        ([(0, "a"), (1, "b"), (2, "c")], True)
    ]


def test_streamed_choices_keep_their_index_and_finish_once() -> None:
    streamed = collect(outputs("a", "b"), outputs("c", "d", "e"), delta=True)
    pieces = [piece for (piece,), _ in streamed]
    assert [text for index, text in pieces if index == 0] == ["a", "b"]
    assert [text for index, text in pieces if index == 1] == ["c", "d", "e"]
    assert [finished for _, finished in streamed] == [False] * 4 + [True]
