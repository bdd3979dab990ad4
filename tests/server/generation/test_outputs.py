from types import SimpleNamespace
from typing import Any

from server.generation.outputs import Hider, drop_first_token
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
