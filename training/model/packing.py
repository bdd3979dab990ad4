"""Whether a model keeps rows apart that share a sequence."""

from typing import Any

from models.errors import ConfigError

TOLERANCE = 1e-3


def check_packing(model: Any) -> None:
    """Holds a model to what packing needs: positions that start again start another row.

    Attention does that in transformers; recurrent layers, sliding caches or a model that takes no
    positions may not, and would then learn to continue what another row said.

    Args:
        model: A causal language model, in fp32 or lower.

    Raises:
        ConfigError: A row changes what the model says about the row behind it.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    row = [token % vocabulary for token in (11, 17, 23, 29)]
    others = [[token % vocabulary for token in other] for other in ((5, 7, 3), (2, 13, 19))]
    positions = [0, 1, 2, 0, 1, 2, 3]
    device = next(model.parameters()).device
    with torch.no_grad():
        first, second = (
            model(
                input_ids=torch.tensor([[*other, *row]], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
            ).logits[0, 3:]
            for other in others
        )
    if not torch.allclose(first.float(), second.float(), rtol=TOLERANCE, atol=TOLERANCE):
        raise ConfigError(
            f"optimisation.packing: {type(model).__name__} lets rows that share a sequence see "
            "each other; set it to false"
        )
