"""The decision: which control token opens the answer.

Everything is computed on a ``[rows, k + 1]`` slice of fp32 logits: the refusal tokens in manifest
order, the respond token last. Nothing here knows of vLLM, HTTP or files.
"""

import math
import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from models.controls import Controls, Rule


class Dials(NamedTuple):
    """What a batch of requests asks of the decision.

    Attributes:
        bias: ``[rows, k]`` fp32, added to each refusal logit; ``-inf`` never, ``+inf`` always.
        rule: ``[rows]`` int, a ``Rule``.
        selected: ``[rows, k]`` bool, the categories a request named; only ``PAPER`` reads it.
        temperature: ``[rows]`` fp32; only ``SAMPLE`` reads it, 0 means greedy.
        uniform: ``[rows]`` fp32, the random draw of ``uniform_draw``; only ``SAMPLE`` reads it.
    """

    bias: torch.Tensor
    rule: torch.Tensor
    selected: torch.Tensor
    temperature: torch.Tensor
    uniform: torch.Tensor


def uniform_draw(seed: int) -> float:
    """Returns the draw in [0, 1) that belongs to a request's seed.

    It lies on a grid of 2^-22, so that in fp32 its product with a sum of probabilities stays below
    that sum. The generator is not the sampler's: the decision and the text do not correlate.
    """
    return random.Random(seed).getrandbits(22) / 2**22


def decide(
    logits: torch.Tensor,
    dials: Dials,
    rules: Collection[Rule],
    log_normaliser: torch.Tensor | None = None,
) -> torch.Tensor:
    """Chooses one control token a row.

    Args:
        logits: ``[rows, k + 1]`` fp32 logits of the control tokens, the respond token last.
        dials: What each row asks for.
        rules: Every rule that stands in ``dials.rule``, known on the host so that nothing is
            computed for rules that no row asks for.
        log_normaliser: ``[rows]`` fp32 log-sum-exp over the whole vocabulary; ``PAPER`` needs it.

    Returns:
        ``[rows]`` int64 column indices: ``0..k-1`` refuse, ``k`` respond. Ties refuse, and among
        refusals the first in manifest order wins.

    Raises:
        ValueError: ``PAPER`` is asked for without the normaliser.
    """
    scores = biased_scores(logits, dials.bias)
    choice = scores.argmax(dim=-1)
    if Rule.SAMPLE in rules:
        sampled = _sample(scores, choice, dials.temperature, dials.uniform)
        choice = torch.where(dials.rule == Rule.SAMPLE, sampled, choice)
    if Rule.PAPER in rules:
        if log_normaliser is None:
            raise ValueError("the paper's rule needs the log-normaliser of the whole vocabulary")
        paper = _paper_rule(logits, log_normaliser, dials)
        choice = torch.where(dials.rule == Rule.PAPER, paper, choice)
    return choice


def refused_category(
    log_normaliser: float,
    margins: Sequence[float],
    controls: Controls,
    temperature: float,
    seed: int | None,
) -> int | None:
    """Returns what one request would be refused for, from the margins that it was seen with.

    Args:
        log_normaliser: Log-sum-exp of the whole vocabulary's logits minus the respond token's.
        margins: fp32 log-odds, one a category.
        controls: Its dials.
        temperature: The request's.
        seed: The request's; without one ``SAMPLE`` draws anew.

    Returns:
        A category's index, or None for an answer.
    """
    uniform = random.random() if seed is None else uniform_draw(seed)
    dials = Dials(
        bias=torch.tensor([controls.bias], dtype=torch.float32),
        rule=torch.tensor([int(controls.rule)]),
        selected=torch.tensor([controls.selected]),
        temperature=torch.tensor([temperature], dtype=torch.float32),
        uniform=torch.tensor([uniform], dtype=torch.float32),
    )
    logits = torch.tensor([[*margins, 0.0]], dtype=torch.float32)
    normaliser = torch.tensor([log_normaliser], dtype=torch.float32)
    choice = int(decide(logits, dials, {controls.rule}, normaliser)[0])
    return None if choice == len(margins) else choice


def biased_scores(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns the log-odds of each control token against the respond token, after the bias.

    Where a bias is ``+inf`` only such categories stay in the race, and the largest margin among
    them wins; adding the infinity itself would make them tie.

    Args:
        logits: ``[rows, k + 1]`` fp32.
        bias: ``[rows, k]`` fp32.

    Returns:
        ``[rows, k + 1]`` fp32, the last column 0 or ``-inf``.
    """
    margins = logits[:, :-1] - logits[:, -1:]
    always = bias == math.inf
    forced = always.any(dim=-1, keepdim=True)
    refusals = torch.where(always, margins, (margins + bias).masked_fill(forced, -math.inf))
    respond = torch.zeros_like(refusals[:, :1]).masked_fill(forced, -math.inf)
    return torch.cat((refusals, respond), dim=-1)


def _sample(
    scores: torch.Tensor, greedy: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    # Refusals stand before the respond token, so for one draw a rising bias can only turn an
    # answer into a refusal, never back.
    cold = temperature <= 0
    scaled = scores / temperature.masked_fill(cold, 1.0).unsqueeze(-1)
    cumulated = scaled.softmax(dim=-1).cumsum(dim=-1)
    total = cumulated[:, -1:]
    drawn = (cumulated <= uniform.unsqueeze(-1) * total).sum(dim=-1)
    return torch.where(cold, greedy, drawn.clamp(max=scores.shape[-1] - 1))


def _paper_rule(logits: torch.Tensor, log_normaliser: torch.Tensor, dials: Dials) -> torch.Tensor:
    respond = logits.shape[-1] - 1
    top_logit, top = logits[:, :-1].max(dim=-1)
    bias = dials.bias.gather(1, top.unsqueeze(-1)).squeeze(-1)
    # T = 1 - x, so ln T = ln sigmoid(-b).
    log_threshold = torch.nn.functional.logsigmoid(-bias)
    reaches = (top_logit - log_normaliser >= log_threshold) & (bias > -math.inf)
    thresholded = torch.where(reaches, top, torch.full_like(top, respond))
    picked = dials.selected.gather(1, top.unsqueeze(-1)).squeeze(-1)
    return torch.where(picked, thresholded, logits.argmax(dim=-1))
