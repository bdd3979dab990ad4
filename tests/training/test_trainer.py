import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from training.data import Example
from training.trainer import (
    IGNORED,
    Collator,
    LengthBuckets,
    as_dataset,
    token_log_probs,
    weighted_mean,
)


def _model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    build: Any = LlamaForCausalLM
    return build(config).eval()


def test_log_probs_are_those_of_the_full_softmax() -> None:
    model = _model()
    ids = torch.randint(0, 50, (3, 7))
    labels = ids.clone()
    labels[0, :4] = IGNORED
    labels[1, :2] = IGNORED
    labels[1, 5:] = IGNORED
    labels[2] = IGNORED

    found = token_log_probs(model, ids, labels)

    full = model(input_ids=ids).logits.log_softmax(-1)
    for row in range(3):
        for at in range(6):
            learnt = labels[row, at + 1] != IGNORED
            wanted = full[row, at, ids[row, at + 1]].item() if learnt else 0.0
            assert found[row, at].item() == pytest.approx(wanted, abs=1e-5)


def test_log_probs_agree_with_the_fused_head_of_trl() -> None:
    model = _model()
    ids = torch.randint(0, 50, (2, 6))
    labels = ids.masked_fill(torch.arange(6) < 3, IGNORED)
    own = token_log_probs(model, ids, labels)
    add_fused_lm_head(model)

    fused = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs

    assert torch.allclose(own, fused, atol=1e-5)


def test_log_probs_of_a_batch_without_labels_are_zero_and_differentiable() -> None:
    model = _model()
    ids = torch.randint(0, 50, (2, 4))

    found = token_log_probs(model, ids, torch.full_like(ids, IGNORED))
    torch.autograd.backward(found.sum())

    assert not found.any()


def test_padding_on_the_right_changes_no_log_prob() -> None:
    model = _model()
    ids = torch.randint(1, 50, (1, 5))
    padded = torch.cat((ids, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    labels = torch.cat((ids, torch.full((1, 3), IGNORED)), dim=1)

    alone = token_log_probs(model, ids, ids)
    beside = token_log_probs(model, padded, labels)

    assert torch.allclose(alone, beside[:, :4], atol=1e-6)
    assert not beside[:, 4:].any()


def test_weighted_mean_by_hand() -> None:
    losses = torch.tensor([[1.0, 2.0], [5.0, 9.0]])
    weights = torch.tensor([[10.0, 1.0], [1.0, 0.0]])

    assert weighted_mean(losses, weights).item() == pytest.approx((10 + 2 + 5) / 12)


def test_weighted_mean_of_nothing_is_zero_with_a_gradient() -> None:
    losses = torch.ones(1, 2, requires_grad=True)

    mean = weighted_mean(losses, torch.zeros(1, 2))
    torch.autograd.backward(mean)

    assert mean.item() == 0.0
    assert losses.grad is not None
    assert not losses.grad.any()


def test_collator_pads_on_the_right_and_hides_what_weighs_nothing() -> None:
    batch = Collator(pad_id=9)(
        [
            {"input_ids": [1, 2, 3], "weights": [0.0, 5.0, 1.0]},
            {"input_ids": [4], "weights": [1.0]},
        ]
    )

    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["weights"].tolist() == [[0.0, 5.0, 1.0], [1.0, 0.0, 0.0]]


def test_dataset_keeps_the_lengths() -> None:
    dataset = as_dataset([Example([1, 2], [0.0, 1.0]), Example([3], [1.0])])

    assert dataset["length"][:] == [2, 1]


def test_buckets_hand_out_every_row_once_in_a_new_order_each_pass() -> None:
    lengths = [number % 13 for number in range(107)]
    sampler = LengthBuckets(lengths, batch_size=8, seed=1)

    first, second = list(sampler), list(sampler)

    assert sorted(first) == sorted(second) == list(range(107))
    assert first != second
    assert list(LengthBuckets(lengths, batch_size=8, seed=1)) == first


def test_rows_of_one_batch_are_about_equally_long() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (400,), generator=generator).tolist()

    order = list(LengthBuckets(lengths, batch_size=8, seed=0))

    batches = [[lengths[row] for row in order[at : at + 8]] for at in range(0, 400, 8)]
    spreads = [max(batch) - min(batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 5
    assert math.ceil(len(order) / 8) == len(batches)
