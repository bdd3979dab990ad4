"""Whether a model's text does what its control token says, against the model's own choice."""

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from models.manifest import Manifest
from training.data.encoding import Row
from training.measure.monitor import (
    DecisionMonitor,
    decision_of,
    encode,
    fitting,
    measuring,
    padding_id,
)
from training.measure.report import ANSWER, Share, count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from training.measure.judge import Judge

MAX_NEW_TOKENS = 48


def flip_fidelity(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    manifest: Manifest,
    rows: Sequence[Row],
    judge: "Judge",
    *,
    sample: int,
    seed: int,
    max_length: int | None,
    batch_size: int = 32,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Share]:
    """Forces decisions against the model's own, and counts the texts that do as they are told.

    A prompt that the model would refuse is forced to respond; one that it would answer is forced to
    refuse, for each category in turn. The texts are the most likely ones, without control tokens,
    as a server makes them.

    Args:
        model: A plain causal language model with `generate`, not wrapped for several processes:
            with several processes, each calls this, since its measurement is shared among them.
        tokenizer: It holds the control tokens and a chat template.
        manifest: Names the control tokens.
        rows: The rows to draw from.
        judge: Tells what a text does; fitted on the training rows.
        sample: How many rows are drawn, at least one; all where there are fewer.
        seed: Seed of that draw.
        max_length: Rows of more tokens are not drawn; None for any length.
        batch_size: Rows that are generated at once.
        max_new_tokens: Longest text.

    Returns:
        `flip_to_respond`, and `flip_to_refuse/<category>` for each: how many of how many.

    Raises:
        ConfigError: There is no row to draw, or one cannot be encoded.
        EvaluationError: A logit is not finite.
    """
    if max_length is not None:
        rows = fitting(rows, tokenizer, manifest, max_length)
    drawn = random.Random(seed).sample(list(rows), min(sample, len(rows)))
    monitor = DecisionMonitor(
        drawn, tokenizer, manifest, max_length=max_length, batch_size=batch_size, text_rows=0
    )
    refused = monitor.measure(model).margins.max(axis=1) >= 0
    names = manifest.names
    forced = [
        ANSWER if own else names[number % len(names)] for number, own in enumerate(refused.tolist())
    ]
    opening = {c.name: c.id for c in manifest.categories} | {ANSWER: manifest.respond.id}
    examples = encode(drawn, tokenizer, manifest, max_length)
    prompts = [
        [*decision_of(example, manifest).ids, opening[word]]
        for example, word in zip(examples, forced, strict=True)
    ]
    texts = generate(model, tokenizer, manifest, prompts, batch_size, max_new_tokens)
    return count_flips(forced, judge.kinds(texts), names)


def generate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    manifest: Manifest,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Returns the most likely text after each prompt, free of control tokens.

    Args:
        model: A causal language model with `generate`.
        tokenizer: Turns ids into text.
        manifest: Names the control tokens, which are not generated.
        prompts: Token ids, each up to and with its control token.
        batch_size: Prompts at once; those of one batch are about equally long.
        max_new_tokens: Longest text.
    """
    from transformers import GenerationConfig

    make: Any = GenerationConfig  # transformers leaves it without annotations
    settings = make(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        suppress_tokens=manifest.control_ids,
        eos_token_id=_stops(model, tokenizer),
        pad_token_id=padding_id(tokenizer),
        use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    texts = [""] * len(prompts)
    with measuring(model):
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            ids, mask = _padded_left([prompts[at] for at in members], padding_id(tokenizer))
            made = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
            )
            told = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
            for at, text in zip(members, told, strict=True):
                texts[at] = str(text).strip()
    return texts


def _padded_left(
    prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for at, prompt in enumerate(prompts):
        ids[at, longest - len(prompt) :] = torch.tensor(prompt)
        mask[at, longest - len(prompt) :] = 1
    return ids, mask


def _stops(model: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    known = model.generation_config.eos_token_id
    own = known if isinstance(known, Iterable) else [known]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if isinstance(token, int)})


def count_flips(
    forced: Sequence[str], judged: Sequence[str], names: Sequence[str]
) -> dict[str, Share]:
    """Returns `flip_to_respond` and `flip_to_refuse/<category>`.

    Args:
        forced: What each text was forced to: a category or `answer`.
        judged: What it does.
        names: The categories.
    """

    def kept(word: str) -> Share:
        return count(
            kind == word for told, kind in zip(forced, judged, strict=True) if told == word
        )

    return {
        "flip_to_respond": kept(ANSWER),
        **{f"flip_to_refuse/{name}": kept(name) for name in names},
    }
