"""The decision: which control token opens the answer.

It is computed on a ``[rows, k + 1]`` slice of fp32 logits: the refusal tokens in manifest order,
the respond token last. This module knows nothing of vLLM, HTTP or files.
"""

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from models.controls import Controls, Rule, dial_row


@dataclass(frozen=True)
class Dials:
    """The dials of a batch of requests, as rows of one matrix.

    The columns are sliced where a rule reads them: a view costs as much as a sum.

    Attributes:
        rows: ``[rows, 3 k + 4]`` fp32, each made by ``dial_row``; more columns are ignored.
        categories: k.
    """

    rows: torch.Tensor
    categories: int

    @cached_property
    def shift(self) -> torch.Tensor:
        """``[rows, k + 1]`` added to each token's margin; ``-inf`` excludes the token."""
        return self.rows[:, : self.categories + 1]

    @property
    def bias(self) -> torch.Tensor:
        """``[rows, k]``; only ``PAPER`` reads it."""
        return self.rows[:, self.categories + 1 : 2 * self.categories + 1]

    @property
    def selected(self) -> torch.Tensor:
        """``[rows, k]`` bool, the categories a request named; only ``PAPER`` reads it."""
        return self.rows[:, 2 * self.categories + 1 : 3 * self.categories + 1] > 0

    @property
    def rule(self) -> torch.Tensor:
        """``[rows]``, a ``Rule``."""
        return self.rows[:, 3 * self.categories + 1]

    @property
    def temperature(self) -> torch.Tensor:
        """``[rows]``; only ``SAMPLE`` reads it, 0 means greedy."""
        return self.rows[:, 3 * self.categories + 2]

    @property
    def uniform(self) -> torch.Tensor:
        """``[rows]``, the draw of ``uniform_draw``; only ``SAMPLE`` reads it."""
        return self.rows[:, 3 * self.categories + 3]


def uniform_draw(seed: int) -> float:
    """Returns the draw in [0, 1) that belongs to a request's seed.

    It lies on a grid of 2^-22, so that in fp32 its product with a sum of probabilities stays below
    that sum. The generator is not the sampler's: the decision and the text do not correlate.
    """
    return random.Random(seed).getrandbits(22) / 2**22


def decide(
    logits: torch.Tensor,
    dials: Dials,
    rules: Collection[int],
    log_normaliser: torch.Tensor | None = None,
) -> torch.Tensor:
    """Chooses one control token a row.

    Args:
        logits: ``[rows, k + 1]`` fp32 logits of the control tokens, the respond token last.
        dials: One row a request.
        rules: Every rule in ``dials.rule``. The host knows them, so no other rule is computed.
        log_normaliser: ``[rows]`` fp32 log-sum-exp over the whole vocabulary; ``PAPER`` needs it.

    Returns:
        ``[rows]`` int64 column indices: ``0..k-1`` refuse, ``k`` respond. Ties refuse, and among
        refusals the first in manifest order wins.

    Raises:
        ValueError: ``PAPER`` is in ``rules`` without the normaliser.
    """
    scores = logits - logits[:, -1:] + dials.shift
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
    """Decides one request from its margins, as the worker would.

    Args:
        log_normaliser: Log-sum-exp of the whole vocabulary's logits minus the respond token's.
        margins: fp32 log-odds, one a category.
        controls: The request's.
        temperature: The request's.
        seed: The request's; without one ``SAMPLE`` draws anew.

    Returns:
        The refused category's index, or None for an answer.
    """
    uniform = random.random() if seed is None else uniform_draw(seed)
    row = dial_row(controls.bias, controls.selected, controls.rule, temperature, uniform)
    dials = Dials(torch.tensor([row], dtype=torch.float32), len(margins))
    logits = torch.tensor([[*margins, 0.0]], dtype=torch.float32)
    normaliser = torch.tensor([log_normaliser], dtype=torch.float32)
    choice = int(decide(logits, dials, {controls.rule}, normaliser)[0])
    return None if choice == len(margins) else choice


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
