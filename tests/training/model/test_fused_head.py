import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from loss.flexible import flexible_loss
from loss.fused import FusedLoss
from models.errors import ConfigError
from tests.training.killing import SPAWN
from training.model.fused_head import FusedHead, supports

VOCABULARY = 61
NEW_TOKENS = [58, 59, 60]
SHARDED = [sys.executable, "-m", "tests.training.sharded"]


def _model(kind: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        # The default of 0.02 leaves all logits nearly equal.
        "initializer_range": 0.3,
    }
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    return getattr(transformers, f"{kind}ForCausalLM")(config)


class Batch:
    """Two rows of ids, targets, weights and parameters."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, VOCABULARY, (2, 9), generator=draw)
        self.ids[0, 3] = NEW_TOKENS[0]
        self.targets = torch.cat((self.ids[:, 1:], torch.full((2, 1), -100)), dim=1)
        self.weights = torch.rand(2, 9, generator=draw)
        self.weights[0, :2] = self.weights[:, -1] = 0.0
        self.q = torch.rand(2, 9, generator=draw)
        self.gamma = 2.0 * torch.rand(2, 9, generator=draw)

    def fused(self, head: FusedHead, model: nn.Module) -> FusedLoss:
        return head(
            model,
            {"input_ids": self.ids},
            targets=self.targets,
            token_weights=self.weights,
            q=self.q,
            gamma=self.gamma,
        )

    def plain(self, model: nn.Module) -> FusedLoss:
        every = model(input_ids=self.ids, use_cache=False).logits.float().log_softmax(-1)
        log_probs = every.gather(-1, self.targets.clamp(min=0)[..., None]).squeeze(-1)
        losses = flexible_loss(log_probs, self.q, self.gamma)
        kept = self.weights > 0
        return FusedLoss((losses * self.weights).sum(), log_probs.detach().where(kept, 0.0))


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(0.25 * loss)
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _assert_same_training(model: nn.Module, tolerance: float = 1e-5) -> dict[str, Tensor]:
    """Compares loss, log-probabilities and every gradient with the plain way's."""
    batch, head = Batch(), FusedHead(model)
    wanted, found = batch.plain(model), batch.fused(head, model)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    expected = _gradients(model, wanted.loss_sum)
    gradients = _gradients(model, found.loss_sum)
    assert expected
    torch.testing.assert_close(gradients, expected, rtol=tolerance, atol=tolerance)
    return gradients


@pytest.mark.parametrize(
    ("kind", "tied"),
    [("Llama", False), ("Llama", True), ("Qwen2", True), ("Qwen3", False), ("Gemma", True)],
)
def test_loss_and_gradients_equal_those_of_the_logits(kind: str, tied: bool) -> None:
    model = _model(kind, tie_word_embeddings=tied)

    gradients = _assert_same_training(model)

    assert ("lm_head.weight" in gradients) is not tied
    assert set(gradients) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "neutral"),
    [
        ("Gemma2", {"final_logit_softcapping": None}),
        ("Granite", {"logits_scaling": 1.0}),
        ("Cohere", {"logit_scale": 1.0}),
    ],
)
def test_a_head_without_its_special_step_is_supported(kind: str, neutral: dict[str, Any]) -> None:
    _assert_same_training(_model(kind, **neutral), tolerance=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Gemma2", {}, "final_logit_softcapping = 30.0"),
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
        ("Cohere", {}, "logit_scale = 0.0625"),
    ],
)
def test_what_comes_after_the_head_is_a_reason_against(
    kind: str, changes: dict[str, Any], reason: str
) -> None:
    model = _model(kind, **changes)

    assert reason in (supports(model) or "")
    with pytest.raises(ConfigError, match=r"set optimisation\.fused_head: false"):
        FusedHead(model)


def _adapted(model: Any, **changes: Any) -> PeftModel:
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**(options | changes)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            # B is 0 at the start, and A gets no gradient through it.
            if "lora_B" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert isinstance(adapted, PeftModel)
    return adapted


def test_adapters_leave_the_frozen_matrix_without_a_gradient() -> None:
    gradients = _assert_same_training(_adapted(_model()))

    assert all("lora" in name for name in gradients)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_are_trained_beside_adapters(tied: bool) -> None:
    layers = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    model = _adapted(
        _model(tie_word_embeddings=tied),
        trainable_token_indices=dict.fromkeys(layers, NEW_TOKENS),
    )

    gradients = _assert_same_training(model)

    rows = [name for name in gradients if "trainable_tokens_delta" in name]
    assert len(rows) == len(layers)
    assert all(gradients[name].any(dim=-1).all() for name in rows if "lm_head" in name or tied)


def test_a_disabled_adapter_does_not_count() -> None:
    model = _adapted(_model(), trainable_token_indices={"lm_head": NEW_TOKENS})
    batch, head = Batch(), FusedHead(model)

    with model.disable_adapter():
        off = batch.fused(head, model)
        torch.testing.assert_close(off, batch.plain(model))

    assert not torch.isclose(off.loss_sum, batch.fused(head, model).loss_sum)


def test_a_head_that_is_trained_and_saved_whole() -> None:
    model = _adapted(_model(), modules_to_save=["lm_head"])

    gradients = _assert_same_training(model)

    assert any("lm_head" in name for name in gradients)


def test_an_adapter_on_the_head_itself_is_a_reason_against() -> None:
    model = _adapted(_model(), target_modules=["lm_head"])

    assert "not a plain torch.nn.Linear" in (supports(model) or "")


def test_a_model_without_a_head_is_a_reason_against() -> None:
    assert "its output layer is none" in (supports(_model().model) or "")
    assert "its output layer is none" in (supports(nn.Linear(2, 2)) or "")


def test_a_replaced_forward_of_the_head_is_a_reason_against() -> None:
    model = _model()
    model.lm_head.forward = lambda hidden: hidden

    assert "replaced the forward" in (supports(model) or "")


def test_bfloat16_autocast() -> None:
    model, batch = _model(), Batch()
    head = FusedHead(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = batch.fused(head, model), batch.plain(model)

    # A product of fewer rows may round differently, by 2^-9 of a logit.
    torch.testing.assert_close(found, wanted, rtol=5e-3, atol=5e-2)
    own, other = _gradients(model, found.loss_sum), _gradients(model, wanted.loss_sum)
    for name, gradient in own.items():
        assert gradient.dtype == torch.float32
        assert (gradient - other[name]).norm() < 0.02 * other[name].norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = _model().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()

    _assert_same_training(model)


def test_the_model_is_the_same_before_and_after(tmp_path: Path) -> None:
    model, batch = _model(), Batch()
    modules, before = dict(model.named_modules()), model(input_ids=batch.ids).logits
    head = FusedHead(model)

    batch.fused(head, model)

    assert dict(model.named_modules()) == modules
    assert supports(model) is None
    torch.testing.assert_close(model(input_ids=batch.ids).logits, before)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids=batch.ids).logits, before)


def test_an_error_in_the_forward_leaves_the_model_usable() -> None:
    model, batch = _model(), Batch()
    head = FusedHead(model)
    wrong = batch.targets
    batch.targets = wrong[:, :-1]

    with pytest.raises(ValueError, match=r"got hidden states of \[2, 9\], targets are \[2, 8\]"):
        batch.fused(head, model)

    assert model(input_ids=batch.ids).logits.shape == (2, 9, VOCABULARY)


class Scaled(nn.Module):
    """A model whose configuration does not tell that it changes its logits."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner = _model()
        self.change = change

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        outputs = self.inner(**inputs)
        outputs.logits = self.change(outputs.logits)
        return outputs


def test_a_step_after_the_head_that_no_one_knew_of_is_found() -> None:
    model, batch = Scaled(lambda logits: 2.0 * logits), Batch()

    with pytest.raises(ConfigError, match="it changes its logits after the output layer"):
        batch.fused(FusedHead(model), model)


def test_a_copy_of_what_the_head_returns_is_accepted() -> None:
    model, batch = Scaled(lambda logits: logits.clone()), Batch()
    head = FusedHead(model)

    for _ in range(2):
        torch.testing.assert_close(batch.fused(head, model), batch.plain(model.inner))


class TwoHeads(Scaled):
    def forward(self, **inputs: Any) -> Any:
        self.inner(**inputs)
        return self.inner(**inputs)


def test_a_head_that_is_used_twice_is_found() -> None:
    model = TwoHeads(lambda logits: logits)

    with pytest.raises(ConfigError, match="called the output layer 2 times, not once"):
        Batch().fused(FusedHead(model), model)


def test_processes_that_share_or_shard_the_model_get_the_same_gradients(tmp_path: Path) -> None:
    # It takes the model and the batch from here.
    from tests.training.sharded import compare_in_process

    ways = ["ddp", "fsdp2", "fsdp2-head", "fsdp1"]
    processes = [
        SPAWN.Process(target=compare_in_process, args=(rank, str(tmp_path / "meeting"), ways))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    try:
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
