from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.errors import CheckpointError
from models.manifest import Manifest
from models.tokens import (
    COCONOT_DESCRIPTIONS,
    add_control_tokens,
    grow_embeddings,
    refusal_token,
    single_id,
)
from tests.toy import MARKERS, byte_tokenizer, tiny_model

TWO = {"safety": "asks for something harmful", "other": "is odd"}


def test_each_token_becomes_one_new_id() -> None:
    tokenizer = byte_tokenizer()
    before = len(tokenizer)
    manifest = add_control_tokens(tokenizer, COCONOT_DESCRIPTIONS)
    assert manifest.control_ids == list(range(before, before + 6))
    assert manifest.names == list(COCONOT_DESCRIPTIONS)
    for control in manifest.control_tokens:
        assert tokenizer.encode(control.token, add_special_tokens=False) == [control.id]
        inside = tokenizer.encode(f"a{control.token}b", add_special_tokens=False)
        assert inside[1:-1] == [control.id]
        assert tokenizer.decode([control.id], skip_special_tokens=True) == ""
    assert manifest.respond.token == "[respond]"
    assert manifest.categories[0].token == refusal_token("safety") == "[refuse:safety]"
    assert manifest.categories[0].description == COCONOT_DESCRIPTIONS["safety"]


def test_special_tokens_that_were_there_stay() -> None:
    tokenizer = byte_tokenizer()
    ids = [single_id(tokenizer, marker) for marker in MARKERS]
    add_control_tokens(tokenizer, TWO)
    assert [single_id(tokenizer, marker) for marker in MARKERS] == ids
    assert tokenizer.eos_token == "<|end|>"


def test_adding_twice_changes_nothing() -> None:
    tokenizer = byte_tokenizer()
    first = add_control_tokens(tokenizer, TWO)
    size = len(tokenizer)
    assert add_control_tokens(tokenizer, TWO) == first
    assert len(tokenizer) == size


@pytest.mark.parametrize("text", ["[respond]", ""])
def test_single_id_refuses_what_is_not_one_id(text: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'{text}' is {len(text)} ids".replace("[", r"\[")):
        single_id(byte_tokenizer(), text)


def rows_of(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight
    return weight.detach().clone()


def phrase_ids(tokenizer: PreTrainedTokenizerFast, phrase: str) -> list[int]:
    """The ids of a phrase on the byte tokenizer: one a byte, a space is the letter Ġ."""
    return [tokenizer.get_vocab()["Ġ" if c == " " else c] for c in phrase]


def slow_mean(rows: torch.Tensor, ids: list[int]) -> torch.Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for i in ids:
        total += rows[i].double()
    return total / len(ids)


def untied_model(vocab_size: int) -> LlamaForCausalLM:
    config = tiny_model(vocab_size).config
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    build: Any = LlamaForCausalLM
    model: LlamaForCausalLM = build(config)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_their_phrase_and_old_rows_stay(tied: bool) -> None:
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    model = tiny_model(size) if tied else untied_model(size)
    before = [rows_of(model.get_input_embeddings()), rows_of(model.lm_head)]
    assert torch.equal(*before) is tied
    manifest = add_control_tokens(tokenizer, TWO)
    grow_embeddings(model, tokenizer, manifest)

    phrases = {
        manifest.categories[0].id: "Sorry, I cannot: it asks for something harmful",
        manifest.categories[1].id: "Sorry, I cannot: it is odd",
        manifest.respond.id: "Sure, here is the answer",
    }
    after = [rows_of(model.get_input_embeddings()), rows_of(model.lm_head)]
    for old, new in zip(before, after, strict=True):
        assert new.shape == (size + 3, old.shape[1])
        assert torch.equal(new[:size], old)
        for token_id, phrase in phrases.items():
            expected = slow_mean(old, phrase_ids(tokenizer, phrase))
            torch.testing.assert_close(new[token_id].double(), expected, rtol=0, atol=1e-6)
    assert model.config.vocab_size == size + 3
    if tied:
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_rows_that_were_there_are_kept_when_the_vocabulary_has_room() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer) + 64)
    before = rows_of(model.get_input_embeddings())
    manifest = add_control_tokens(tokenizer, TWO)
    grow_embeddings(model, tokenizer, manifest)
    assert torch.equal(rows_of(model.get_input_embeddings()), before)


def test_only_the_rows_beyond_the_old_vocabulary_are_new() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer) + 1)  # room for the first of three tokens
    before = rows_of(model.get_input_embeddings())
    manifest: Manifest = add_control_tokens(tokenizer, TWO)
    grow_embeddings(model, tokenizer, manifest)
    after = rows_of(model.get_input_embeddings())
    assert torch.equal(after[: len(before)], before)
    expected = slow_mean(before, phrase_ids(tokenizer, "Sure, here is the answer"))
    torch.testing.assert_close(after[manifest.respond.id].double(), expected, rtol=0, atol=1e-6)


def test_growing_twice_keeps_what_was_learnt() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer))
    manifest = add_control_tokens(tokenizer, TWO)
    grow_embeddings(model, tokenizer, manifest)
    layer: Any = model.get_input_embeddings()
    with torch.no_grad():
        layer.weight[manifest.respond.id] = 3.0
    grow_embeddings(model, tokenizer, manifest)
    assert bool((rows_of(model.get_input_embeddings())[manifest.respond.id] == 3.0).all())
