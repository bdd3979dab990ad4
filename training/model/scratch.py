"""A tokenizer and a small Llama that start from nothing."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from training.config.recipe import ScratchModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD = "<|pad|>"
END = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
BYTES = 256
LEAST_VOCABULARY = BYTES + 2 + len(ROLES)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('the roles are system, user and assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] or '') | trim + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int
) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE with turn markers and a chat template.

    Args:
        texts: What it is trained on; the same texts in the same order give the same tokenizer.
        vocab_size: Entries at most; fewer where the texts do not yield as many.
        max_length: Longest sequence in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    build: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def new_model(
    config: ScratchModel, tokenizer: "PreTrainedTokenizerFast", seed: int
) -> "PreTrainedModel":
    """Returns a Llama with tied embeddings and random weights that depend on the seed alone.

    Args:
        tokenizer: Control tokens included; the embedding gets one row for each entry.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

    set_seed(seed)
    build: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = build(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return model
