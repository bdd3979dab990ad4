from types import SimpleNamespace
from typing import Any

import pytest

from models.errors import RequestError
from server.generation.parameters import check_params, logprobs_of

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
