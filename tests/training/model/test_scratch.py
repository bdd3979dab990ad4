from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer

from models.tokens import add_control_tokens
from training.config.recipe import ScratchModel
from training.model.scratch import new_model, train_tokenizer

TEXTS = ["Where do apples grow?", "Apples grow on trees.", "I can't help with that."] * 5
SMALL = ScratchModel(
    vocab_size=320, hidden_size=64, layers=2, heads=2, intermediate_size=96, max_length=64
)


def test_tokenizer_gives_every_byte_back() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 64)

    text = "Grüße, 猫 \t apples?"

    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_is_the_same_every_time() -> None:
    first = train_tokenizer(TEXTS, 300, 64)
    second = train_tokenizer(TEXTS, 300, 64)

    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_saved_tokenizer_loads_with_its_template_and_end_token(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 64)
    add_control_tokens(tokenizer, {"safety": "harms"})
    tokenizer.save_pretrained(tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path)

    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")
    rendered = loaded.apply_chat_template(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": " Hi "},
            {"role": "assistant", "content": "[respond]Hello"},
            {"role": "user", "content": "Bye"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == (
        "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>[respond]Hello<|end|>"
        "<|user|>Bye<|end|><|assistant|>"
    )


def test_template_accepts_an_assistant_turn_without_content() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 64)
    turns: list[Any] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None},
    ]

    rendered = tokenizer.apply_chat_template(turns, tokenize=False)

    assert rendered == "<|user|>Hi<|end|><|assistant|><|end|>"


def test_template_refuses_an_unknown_role() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 64)

    with pytest.raises(TemplateError, match="roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_model_has_tied_embeddings_and_stops_at_the_end_token() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 64)

    model: Any = new_model(SMALL, tokenizer, seed=0)

    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 64)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.architectures is None or model.config.architectures == ["LlamaForCausalLM"]


def test_weights_depend_on_the_seed_alone() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 64)

    first, again, other = (new_model(SMALL, tokenizer, seed).state_dict() for seed in (3, 3, 4))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
