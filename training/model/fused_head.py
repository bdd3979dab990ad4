"""The loss straight from a language model's last hidden states, inside the model's own forward.

The output layer computes the loss instead of the logits for the length of one call. It is the same
module at the same place, so whatever hangs on it (FSDP's gathering of its weights, PEFT's adapters,
hooks) works as for logits, and nothing that saves the model ever sees a difference.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from loss.fused import FusedLoss, OutputLayer, TrainedRows, fused_flexible_loss, weighted_rows
from models.errors import ConfigError

# What a model does to its logits after the output layer, and the value that does nothing.
_AFTER_THE_HEAD = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}
_ADVICE = "set optimisation.fused_head: false"


def supports(model: nn.Module) -> str | None:
    """Returns why the loss of this model cannot come from its hidden states, None if it can.

    Args:
        model: A causal language model of transformers, plain or wrapped by PEFT; not yet wrapped
            for several processes.
    """
    try:
        layer = _output_layer(model)
    except _UnknownHeadError as error:
        return str(error)
    if "forward" in vars(layer):
        return "something has replaced the forward of its output layer (a device map's hooks?)"
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name, neutral in _AFTER_THE_HEAD.items():
        value = getattr(text, name, None)
        if value is not None and value != neutral:
            return f"it changes its logits after the output layer ({name} = {value})"
    return None


class FusedHead:
    """Computes the flexible loss of a causal language model without its logits.

    Made once for a model; every call runs one forward:

        head = FusedHead(model)
        loss_sum, log_probs = head(
            wrapped, inputs, targets=targets, token_weights=weights, q=q, gamma=gamma
        )
        (loss_sum / weights.sum()).backward()

    Between calls the model is exactly as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        """Finds the model's output layer."""
        reason = supports(model)
        if reason is not None:
            raise ConfigError(f"no fused head for {_name(model)}: {reason}; {_ADVICE}")
        self._model = model
        self._checked = False

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        targets: Tensor,
        token_weights: Tensor,
        q: float | Tensor,
        gamma: float | Tensor,
    ) -> FusedLoss:
        """Runs `model(**inputs)` and returns the sum of its tokens' weighted losses.

        Args:
            model: The model that `FusedHead` was made for, as it is called in training: itself, or
                wrapped by DDP, FSDP or accelerate.
            inputs: What the forward takes: `input_ids` `[B, T]`, `attention_mask`, `position_ids`
                and the like; no `labels`, no `logits_to_keep`.
            targets: `[B, T]` int64, the token that follows each position: `labels[:, 1:]` and one
                column more. Anything where the weight is 0.
            token_weights: `[B, T]` fp32, weight of predicting `targets`. What is 0 costs nothing.
            q: Number, or `[B, T]`; see `loss.flexible.flexible_loss`.

        Returns:
            `loss_sum`, an fp32 scalar with a gradient: the sum of weight · loss; to be divided by
            the weights' sum for the weighted mean. `log_probs` `[B, T]` fp32 without a gradient,
            0 where the weight is 0.

        Raises:
            ConfigError: The model does not hand on what its output layer returns, or calls it never
                or several times.
        """
        flat = [_flat(value) for value in (q, gamma)]
        # Before the model's forward: later it would wait for all of it on a GPU.
        kept = weighted_rows(token_weights.flatten())
        computed: list[FusedLoss] = []

        def compute(hidden: Tensor, layer: OutputLayer) -> Tensor:
            if hidden.shape[:-1] != targets.shape:
                raise ValueError(
                    f"the output layer got hidden states of {list(hidden.shape[:-1])}, "
                    f"targets are {list(targets.shape)}"
                )
            computed.append(
                fused_flexible_loss(
                    hidden.flatten(0, -2),
                    layer,
                    targets.flatten(),
                    token_weights.flatten(),
                    *flat,
                    kept=kept,
                )
            )
            return computed[-1].loss_sum

        with _computing(_output_layer(self._model), compute):
            loss_sum: Tensor = model(**{**inputs, "use_cache": False}).logits
        self._check(computed, loss_sum)
        return FusedLoss(loss_sum, computed[0].log_probs.view(targets.shape))

    def _check(self, computed: list[FusedLoss], returned: Tensor) -> None:
        """Checks by values what `supports` cannot know; once, since a GPU waits for it."""
        if len(computed) != 1:
            raise ConfigError(
                f"no fused head for {_name(self._model)}: its forward called the output layer "
                f"{len(computed)} times, not once; {_ADVICE}"
            )
        expected = computed[0].loss_sum
        if self._checked or returned is expected:
            return
        if returned.shape != expected.shape or not torch.equal(returned.to(expected), expected):
            raise ConfigError(
                f"no fused head for {_name(self._model)}: it changes its logits after the output "
                f"layer; {_ADVICE}"
            )
        # A sum of 0 stays 0 under any scaling and proves nothing.
        self._checked = bool(expected != 0)


class _UnknownHeadError(ConfigError):
    """The output layer is none that is known; the message says which."""


def _output_layer(model: nn.Module) -> nn.Linear | TrainableTokensLayer:
    """The module whose forward makes the logits, under PEFT's wrappers."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if isinstance(head, ModulesToSaveWrapper) and not head.disable_adapters:
        head = head.modules_to_save[head.active_adapters[0]]
    if isinstance(head, TrainableTokensWrapper):
        head = head.token_adapter
    if isinstance(head, TrainableTokensLayer) and _is_plain(head.base_layer):
        return head
    if _is_plain(head):
        return head
    kind = "none" if head is None else f"a {type(head).__module__}.{type(head).__name__}"
    raise _UnknownHeadError(f"its output layer is {kind}, not a plain torch.nn.Linear")


def _is_plain(head: object) -> TypeGuard[nn.Linear]:
    # FSDP2 makes a class of its own, but leaves the forward; quantised layers have their own.
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


@contextmanager
def _computing(
    layer: nn.Linear | TrainableTokensLayer, compute: Callable[[Tensor, OutputLayer], Tensor]
) -> Iterator[None]:
    """Lets the layer return the loss; its attribute shadows the class's forward."""

    def forward(hidden: Tensor) -> Tensor:
        if isinstance(layer, TrainableTokensLayer):
            weight: Any = layer.base_layer.weight
            return compute(hidden, OutputLayer(weight, trained_rows=_trained_rows(layer)))
        return compute(hidden, OutputLayer(layer.weight, layer.bias))

    attributes = vars(layer)
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]


def _trained_rows(layer: TrainableTokensLayer) -> TrainedRows | None:
    """PEFT's rows in place of the frozen matrix's, as its own forward has them."""
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return None
    (adapter,) = layer.active_adapters
    values = layer.trainable_tokens_delta[adapter]
    return TrainedRows(torch.tensor(layer.token_indices[adapter], device=values.device), values)


def _flat(value: float | Tensor) -> float | Tensor:
    return value.flatten() if isinstance(value, Tensor) else value


def _name(model: nn.Module) -> str:
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return type(base).__name__
