"""Checkpoints of no ability, made in a second, for tests that need files and no skill."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.manifest import Manifest, save_manifest
from models.tokens import COCONOT_DESCRIPTIONS, add_control_tokens

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKERS = ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"]


def byte_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of single bytes, the turn markers, and no control tokens yet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(marker, special=True) for marker in MARKERS])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """Returns a random Llama of two layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def save_base(directory: Path, *, tied: bool = True) -> Path:
    """Writes a model without control tokens that knows nothing, for trainings to start from."""
    tokenizer = byte_tokenizer()
    model: Any = tiny_model(len(tokenizer))
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_toy(directory: Path, template: str = TEMPLATE) -> Manifest:
    """Writes a checkpoint that can be served and knows nothing."""
    tokenizer = byte_tokenizer(template)
    manifest = add_control_tokens(tokenizer, COCONOT_DESCRIPTIONS)
    model = tiny_model(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_manifest(directory, manifest)
    return manifest
