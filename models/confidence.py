"""Confidence arithmetic: from a share of n prompts to bounds on the share of all prompts.

It holds for any distribution, as long as the calibration's prompts and later ones are exchangeable.
There is no normal approximation.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
_ERROR = 1.0 - CONFIDENCE
# Guards floor(alpha * n) against products such as 0.29 * 100 = 28.999999999999996.
_ULPS = 1e-9

Doubles = npt.NDArray[np.float64]


def intervals(counts: npt.ArrayLike, n: npt.ArrayLike) -> tuple[Doubles, Doubles]:
    """Returns the two-sided 95 % intervals of shares, by Clopper and Pearson.

    Args:
        counts: ``[m]``, of n prompts each.
        n: ``[m]`` or one number, at least 1.

    Returns:
        Lower and upper ends, each ``[m]``.

    Source: Clopper & Pearson, Biometrika 26 (1934).
    """
    from scipy.special import betaincinv

    total = np.asarray(n, dtype=np.float64)
    hits = np.clip(np.asarray(counts, dtype=np.float64), 0.0, total)
    # The placeholders keep both shapes positive where the end is 0 or 1 anyway.
    low = betaincinv(np.maximum(hits, 1e-12), total - hits + 1, _ERROR / 2)
    high = betaincinv(hits + 1, np.maximum(total - hits, 1e-12), 1 - _ERROR / 2)
    return np.where(hits > 0, low, 0.0), np.where(hits < total, high, 1.0)


@lru_cache(maxsize=4096)
def refusals_allowed(n: int, limit: float) -> int:
    """Returns how many of n benign prompts may be refused for a bound to be certified.

    The threshold lies just above the (r + 1)-th largest of n exchangeable scores. Whatever their
    distribution,

    1. the share of all prompts above it exceeds ``limit`` with the probability
       P(Bin(n, limit) <= r), at most: the share is Beta(r + 1, n - r), and smaller with ties;
    2. of the next n prompts more than ``limit * n`` lie above it with the probability that among
       the largest r + x of both samples, x = floor(limit * n) + 1, at most r are the calibration's:
       a hypergeometric tail.

    The largest r is taken for which both are at most 5 %. The first speaks of the long run, the
    second of a check on as many prompts again, whose own chance it includes.

    Returns:
        r, or -1 where even r = 0 is not certified.

    Source: 1: Wilks, Ann. Math. Statist. 12 (1941); with ties Scheffé & Tukey, ibid. 16 (1945);
    it equals the one-sided Clopper-Pearson bound. 2: Wilks, ibid. 13 (1942); the same count is
    behind split conformal prediction: Angelopoulos & Bates, arXiv 2107.07511.
    """
    from scipy.special import bdtr

    r = int(np.searchsorted(_next_sample_exceeds(n, limit), _ERROR, side="right")) - 1
    while r >= 0 and bdtr(r, n, limit) > _ERROR:
        r -= 1
    return r


def prompts_needed(limit: float, at_least: int = 0) -> int:
    """Returns the smallest number of prompts, not below ``at_least``, that can certify a limit."""
    n = max(at_least, math.ceil(math.log(_ERROR) / math.log1p(-limit)), 1)
    while refusals_allowed(n, limit) < 0:
        # With the same floor(limit * n) more prompts only make it harder.
        n = max(n + 1, math.ceil((math.floor(limit * n + _ULPS) + 1) / limit - _ULPS))
    return n


def _next_sample_exceeds(n: int, limit: float) -> Doubles:
    """Returns the second statement's chance for r = 0, 1, ..., as far as r may matter.

    With x = floor(limit * n) + 1, more than the limit lie above the (r + 1)-th largest of the
    calibration exactly if at most r of its prompts come before the x-th of the others. That i of
    them do has the probability C(x - 1 + i, i) * C(2n - x - i, n - i) / C(2n, n), whatever r is.
    """
    x = math.floor(limit * n + _ULPS) + 1
    if x > n:
        return np.zeros(n)
    factorials = _log_factorials(n)
    i = np.arange(min(x, n))
    before = factorials[x - 1 : x - 1 + len(i)] - factorials[i] - factorials[x - 1]
    after = factorials[2 * n - x - i] - factorials[n - i] - factorials[n - x]
    every = factorials[2 * n] - 2 * factorials[n]
    chances: Doubles = np.exp(before + after - every).cumsum()
    return chances


@lru_cache(maxsize=64)
def _log_factorials(n: int) -> Doubles:
    from scipy.special import gammaln

    table: Doubles = gammaln(np.arange(2 * n + 1) + 1.0)
    return table
