"""Control tokens: their names, and adding them to a tokenizer and a model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.errors import CheckpointError
from models.manifest import Category, ControlToken, Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESPOND = "[respond]"
# The category of a checkpoint with a single refusal token.
SINGLE = "refuse"
SINGLE_DESCRIPTION = "should not be answered"

# CoCoNot's five categories (arXiv 2407.12043), in the words of its taxonomy.
COCONOT_DESCRIPTIONS: Mapping[str, str] = {
    "safety": "asks for something harmful",
    "humanizing": "takes the model for a human",
    "incomplete": "lacks information or presupposes something false",
    "indeterminate": "has no answer that can be known or agreed on",
    "unsupported": "needs a modality, a length or live data that the model does not have",
}


def refusal_token(category: str) -> str:
    """Returns the token that opens a refusal of ``category``; of `SINGLE` it is ``[refuse]``."""
    return "[refuse]" if category == SINGLE else f"[refuse:{category}]"


def add_control_tokens(
    tokenizer: "PreTrainedTokenizerBase", descriptions: Mapping[str, str]
) -> Manifest:
    """Adds one special token per category and the respond token to a tokenizer.

    Args:
        tokenizer: Changed in place. Tokens that it already has are kept.
        descriptions: One line per category, in the order that breaks ties.

    Returns:
        The manifest, without a recipe.

    Raises:
        CheckpointError: A token did not become one id.
    """
    texts = [*(refusal_token(name) for name in descriptions), RESPOND]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": texts}, replace_extra_special_tokens=False
    )
    return Manifest(
        respond=ControlToken(token=RESPOND, id=single_id(tokenizer, RESPOND)),
        categories=tuple(
            Category(
                name=name,
                token=refusal_token(name),
                id=single_id(tokenizer, refusal_token(name)),
                description=description,
            )
            for name, description in descriptions.items()
        ),
    )


def single_id(tokenizer: "PreTrainedTokenizerBase", token: str) -> int:
    """Returns the one id that ``token`` is encoded to.

    Raises:
        CheckpointError: It is encoded to several ids or to none.
    """
    ids: list[int] = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise CheckpointError(
            f"the control token {token!r} is {len(ids)} ids ({ids}) in the tokenizer and must be "
            "one: add it as a special token"
        )
    return ids[0]


def grow_embeddings(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", manifest: Manifest
) -> None:
    """Adds rows for the control tokens, input and output, and initialises them.

    Each new row is the mean of the rows of the words that describe its token, so a new refusal
    token starts near "I cannot" and not at a random place.

    Args:
        model: Resized in place where its vocabulary is smaller than the tokenizer's. A token that
            already had a row keeps it.
        tokenizer: Changed by ``add_control_tokens``.
        manifest: Returned by ``add_control_tokens``.
    """
    embedding: Any = model.get_input_embeddings()
    known: int = embedding.weight.shape[0]
    if known < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    phrases = {c.id: f"Sorry, I cannot: it {c.description}" for c in manifest.categories}
    phrases[manifest.respond.id] = "Sure, here is the answer"
    for token_id, phrase in phrases.items():
        if token_id >= known:
            ids = tokenizer.encode(phrase, add_special_tokens=False)
            _start_row_from(model, token_id, [i for i in ids if i < known])


def _start_row_from(model: "PreTrainedModel", row: int, sources: Sequence[int]) -> None:
    import torch

    typed: Any = model  # transformers leaves the second method without annotations
    with torch.no_grad():
        for layer in (typed.get_input_embeddings(), typed.get_output_embeddings()):
            if layer is not None:
                layer.weight[row] = layer.weight[list(sources)].mean(dim=0)
