from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from transformers import AutoModelForCausalLM

from models.checkpoint import load_checkpoint
from models.errors import ConfigError
from models.tokens import add_control_tokens, grow_embeddings
from tests.toy import byte_tokenizer, tiny_model
from tests.training.conftest import WriteRows, small_rows
from tests.training.recipes import losses_of, tiny_config, weights_of
from training.config.recipe import LoraConfig
from training.model.lora import add_adapters, merge
from training.run.export import ADAPTER
from training.run.train import train

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


def _adapted(*, tied: bool, **options: Any) -> tuple[Any, list[int]]:
    tokenizer = byte_tokenizer()
    model: Any = tiny_model(len(tokenizer))
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 0.5)
    manifest = add_control_tokens(tokenizer, {"safety": "harms"})
    grow_embeddings(model, tokenizer, manifest)
    adapted = add_adapters(model, LoraConfig(r=4, alpha=8, **options), manifest)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapted.eval(), manifest.control_ids


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("tied", [True, False])
def test_merged_model_has_the_logits_of_the_adapters(tmp_path: Path, tied: bool) -> None:
    adapted, controls = _adapted(tied=tied)
    ids = torch.cat((IDS, torch.tensor([controls, controls[::-1]])), dim=1)
    before = _logits(adapted, ids)

    merged = merge(adapted)
    merged.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert torch.allclose(_logits(merged, ids), before, atol=1e-4)
    assert torch.allclose(_logits(loaded, ids), before, atol=1e-4)
    assert loaded.config.tie_word_embeddings is tied
    shared = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert shared is tied


@pytest.mark.parametrize("tied", [True, False])
def test_only_adapters_and_rows_of_control_tokens_are_trained(tied: bool) -> None:
    adapted, controls = _adapted(tied=tied)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}

    rows = [name for name in trained if "trainable_tokens" in name]
    assert len(rows) == (1 if tied else 2)
    assert {trained[name].shape[0] for name in rows} == {len(controls)}
    assert all("lora_" in name for name in trained.keys() - set(rows))


@pytest.mark.parametrize("target", ["attention", "lm_head", "embed_tokens"])
def test_target_that_is_no_inner_linear_layer_is_named(target: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{target}' is no linear layer.*down_proj.*q_proj"):
        _adapted(tied=True, target_modules=("q_proj", target))


def test_named_targets_alone_get_adapters() -> None:
    adapted, _ = _adapted(tied=True, target_modules=("q_proj",))
    config = adapted.peft_config["default"]

    assert isinstance(config, PeftConfig)
    layers = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert layers == {"q_proj"} or layers == {"self_attn"}


def test_run_with_adapters_exports_an_ordinary_checkpoint(
    write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows(small_rows())
    base = train(tiny_config(rows, optimisation={"epochs": 1}), tmp_path / "base")
    config = tiny_config(
        rows,
        model={"checkpoint": str(base)},
        categories={"safety": "harms", "humanizing": "persons"},
        lora={"r": 8, "alpha": 16},
        optimisation={"epochs": 6, "learning_rate": 1e-2, "packing": True, "batch_size": 4},
    )

    out = train(config, tmp_path / "out")

    load_checkpoint(out)
    assert weights_of(out).keys() == weights_of(base).keys()
    losses = losses_of(out)
    assert losses[-1][1] < 0.9 * losses[0][1]
    # What no adapter hangs on stays as it was.
    assert torch.equal(weights_of(out)["model.norm.weight"], weights_of(base)["model.norm.weight"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    # Beside the weights, transformers would put the adapters on a second time.
    assert not list(out.glob("adapter_*"))
    assert (out / ADAPTER / "adapter_model.safetensors").exists()


def test_weights_are_exported_as_the_base_stored_them(
    write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows(small_rows())
    base = train(tiny_config(rows, optimisation={"epochs": 0.25}), tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.to(torch.bfloat16).save_pretrained(base)
    optimisation = {"epochs": 0.5, "bf16": True}
    for name, changes in {"full": {}, "lora": {"lora": {"r": 2}}}.items():
        config = tiny_config(
            rows, model={"checkpoint": str(base)}, optimisation=optimisation, **changes
        )
        out = train(config, tmp_path / name)

        assert {weight.dtype for weight in weights_of(out).values()} == {torch.bfloat16}
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
