"""What vLLM's V1 sampler does to others of a batch, which server/engine.py keeps away from it."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample import logit_bias

from server.generation.parameters import MOST_IDS, MOST_STOPS

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0], [4.0, 1.0, 2.0, 0.0]])


def alternatives(logprob_token_ids: dict[int, list[int]] | None) -> list[list[int]]:
    """Returns the tokens whose log-probabilities each row of a greedy batch gets."""
    processors: Any = SimpleNamespace(argmax_invariant=[], non_argmax_invariant=[])
    metadata: Any = SimpleNamespace(
        max_num_logprobs=2,
        logprob_token_ids=logprob_token_ids,
        all_greedy=True,
        all_random=False,
        no_penalties=True,
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=processors,
        thinking_budget_state_holder=None,
        output_token_ids=[[], []],
        spec_token_ids=None,
    )
    tensors = Sampler()(LOGITS.clone(), metadata).logprobs_tensors
    ids: list[list[int]] = tensors.logprob_token_ids.tolist()
    return ids


def test_v1_sampler_still_gives_logprob_token_ids_to_all() -> None:
    assert alternatives(None) == [[1, 1, 3], [0, 0, 2]]
    beside = alternatives({0: [2, 3]})
    assert beside[0] == [1, 2, 3]
    assert beside[1] != [0, 0, 2], (
        "vLLM has mended this: allow logprob_token_ids again (SteeredLLM.generate, "
        "SteeredLLM.margins_by_logprobs)"
    )


def test_v2_runners_workers_have_room_for_what_is_let_in() -> None:
    assert logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS >= MOST_IDS
    assert logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS >= MOST_IDS
    # Those that end every answer come on top.
    assert logit_bias.MAX_NUM_STOP_TOKEN_IDS >= MOST_STOPS + 28
