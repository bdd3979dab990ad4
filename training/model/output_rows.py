"""The rows of a model's vocabulary, one a token: set, read and deleted."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.model.token_rows import Floats


def on_device(model: Any) -> Any:
    """Returns the model, ready to read prompts, on a GPU where there is one."""
    import torch

    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def output_rows(model: Any, tokens: Sequence[int]) -> Floats:
    """Returns `[tokens, width]` rows of the output layer."""
    weight = model.get_output_embeddings().weight.detach()
    rows: Floats = weight[list(tokens)].double().cpu().numpy()
    return rows


def set_row(model: Any, token: int, row: Floats) -> None:
    """Sets a row of the output layer, in place.

    With tied embeddings the same row is read in. No prompt holds the token.
    """
    import torch

    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[token] = torch.from_numpy(np.asarray(row)).to(weight)


def delete_row(model: Any, token: int) -> None:
    """Deletes a row, input and output, in place; the rows behind it move up."""
    import torch

    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output.weight is embedding.weight
    for layer in (embedding, output):
        kept = torch.cat((layer.weight.detach()[:token], layer.weight.detach()[token + 1 :]))
        layer.weight = torch.nn.Parameter(kept)
    if tied:
        output.weight = embedding.weight
    embedding.num_embeddings = output.out_features = model.config.vocab_size = len(output.weight)
