from types import SimpleNamespace
from typing import Any

import pytest

from models.errors import RequestError
from server.generation.parameters import check_params, check_room, logprobs_of
from tests.server.generation.enginefake import FakeEngine, parameters

FIELDS = ("logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids")


@pytest.mark.parametrize("field", FIELDS)
def test_parameters_on_control_tokens_are_refused(field: str) -> None:
    value: Any = {7: 1.0} if field == "logit_bias" else [7]
    params: Any = SimpleNamespace(**{**dict.fromkeys(FIELDS), field: value})
    check_params(params, frozenset({8}))
    with pytest.raises(RequestError, match=field) as caught:
        check_params(params, frozenset({7}))
    assert (caught.value.param, caught.value.status) == (field, 400)


@pytest.mark.parametrize(
    ("fields", "streamed", "counts"),
    [
        ({}, False, (0, 0, 0)),
        ({"stream_interval": 9}, True, (0, 0, 0)),
        ({"logprobs": 0}, False, (0, 1, 0)),
        ({"logprobs": 20, "n": 3}, False, (0, 3 * 21, 0)),
        ({"logprobs": 20, "n": 3}, True, (0, 0, 3 * 21)),
        ({"logprobs": 20, "n": 3, "stream_interval": 9}, False, (0, 3 * 21, 0)),
        ({"logprobs": 20, "n": 3, "stream_interval": 9}, True, (0, 0, 3 * 21 * 9)),
        ({"logprobs": 20, "stream_interval": 9, "max_tokens": 4}, True, (0, 0, 21 * 4)),
        ({"logprobs": 1, "prompt_logprobs": 1}, False, (2 * 7, 2, 0)),
        ({"logprobs": 1, "prompt_logprobs": 1}, True, (2 * 7, 0, 2)),
        ({"n": 3, "prompt_logprobs": 1}, False, (3 * 2 * 7, 0, 0)),
        ({"logprobs": -1, "prompt_logprobs": 0}, False, (7, 2**16, 0)),
    ],
)
def test_log_probabilities_are_counted(
    fields: dict[str, int], streamed: bool, counts: tuple[int, int, int]
) -> None:
    unset = dict.fromkeys(("logprobs", "prompt_logprobs", "stream_interval", "max_tokens"))
    params: Any = SimpleNamespace(**{"n": 1, **unset, **fields})
    assert logprobs_of(params, 7, streamed=streamed) == counts


@pytest.mark.parametrize(
    ("fits", "more", "param"),
    [
        ({"allowed_token_ids": list(range(1024))}, {"allowed_token_ids": list(range(1025))}, None),
        (
            {"logit_bias": dict.fromkeys(range(1024), 1.0)},
            {"logit_bias": dict.fromkeys(range(1025), 1.0)},
            None,
        ),
        (
            {"min_tokens": 2, "stop_token_ids": list(range(100))},
            {"min_tokens": 2, "stop_token_ids": list(range(101))},
            "stop_token_ids",
        ),
        ({"bad_words": [" a b"] * 128}, {"bad_words": [" a b c d e"] * 128}, None),
        ({"top_k": 2**63 - 1}, {"top_k": 2**63}, None),
        ({"seed": -(2**63)}, {"top_k": -(2**64)}, None),
        ({"stream_interval": 9}, {"stream_interval": 10**30}, None),
        ({"n": 2, "seed": 2**63 - 2}, {"n": 2, "seed": 2**63 - 1}, "seed"),
    ],
)
def test_what_a_worker_has_no_room_for_is_refused(
    fits: dict[str, Any], more: dict[str, Any], param: str | None
) -> None:
    check_room(parameters(**fits), FakeEngine().text_ids, 1024)
    with pytest.raises(RequestError) as caught:
        check_room(parameters(**more), FakeEngine().text_ids, 1024)
    assert caught.value.param == (param or next(iter(more)))


def test_room_for_bad_words_is_the_workers() -> None:
    params = parameters(bad_words=["a b", "c"])  # with and without a space before each
    check_room(params, FakeEngine().text_ids, 6)
    with pytest.raises(RequestError, match="at most 5 tokens"):
        check_room(params, FakeEngine().text_ids, 5)


def test_stop_tokens_without_a_least_length_are_free() -> None:
    check_room(parameters(stop_token_ids=list(range(2000))), FakeEngine().text_ids, 1024)


def test_watch_for_repetition_has_numbers_of_64_bits() -> None:
    watched = SimpleNamespace(max_pattern_size=10**30, min_pattern_size=1, min_count=2)
    with pytest.raises(RequestError) as caught:
        check_room(parameters(repetition_detection=watched), FakeEngine().text_ids, 1024)
    assert caught.value.param == "repetition_detection.max_pattern_size"
