"""Solving for ``sample``: rates in expectation over the draw.

A prompt is refused with the probability 1 - 1 / (1 + sum of exp((margin + bias) / temperature)),
the softmax of models/decision.py. That rises smoothly with every bias.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from models.thresholds import Doubles, Layout

Scaled = npt.NDArray[np.float64]

# Distance from a margin, in temperatures, at which a token's own share is 0 or 1: exp(-25).
_FAR = 25.0
# Largest exponents whose product, and a sum of such, stays finite in fp64.
_LARGEST = 340.0
# The same for Newton, which must be able to tell: the top prompt is refused with exp(-9).
_NEGLIGIBLE = 9.0
_TOLERANCE = 2e-5
_TINY = 1e-15
_RISE_STEPS = 100
_RISE_WITHIN = 1e-6
_NEWTON_STEPS = 25
_SWEEPS = 60
# Keeps a root on the safe side of the fp32 that is sent, in temperatures.
_SAFE_SIDE = 1e-5


class _Prompts:
    """Prompts of one kind: how heavy each refusal token is beside the respond token's 1.

    Attributes:
        scaled: ``[k, n]``, margins over the temperature.
        exponentials: Of those; none where a temperature near 0 makes them too large, which costs an
            exponential a prompt at every step.
    """

    def __init__(self, scaled: Scaled, exponentials: Scaled | None) -> None:
        self.scaled = scaled
        self.exponentials = exponentials

    @classmethod
    def at(cls, margins: npt.NDArray[np.float32], temperature: float) -> "_Prompts":
        """Returns the prompts of ``[k, n]`` margins."""
        scaled: Scaled = margins / np.float64(temperature)
        small = not scaled.size or float(abs(scaled).max()) < _LARGEST
        return cls(scaled, np.exp(scaled) if small else None)

    def part(self, start: int, end: int) -> "_Prompts":
        """Returns some of them."""
        exponentials = None if self.exponentials is None else self.exponentials[:, start:end]
        return _Prompts(self.scaled[:, start:end], exponentials)

    @property
    def count(self) -> int:
        """Number of prompts."""
        return int(self.scaled.shape[1])

    def weights(self, offsets: Doubles) -> Doubles:
        """Returns each prompt's sum of the tokens' weights, ``[n]``.

        Args:
            offsets: ``[k]``, biases over the temperature.
        """
        weights: Doubles = (
            np.add.reduce(self.each(offsets), axis=0)
            if self.exponentials is None
            else np.exp(np.minimum(offsets, _LARGEST)) @ self.exponentials
        )
        return weights

    def each(self, offsets: Doubles) -> Doubles:
        """Returns each token's own weights, ``[k, n]``."""
        if self.exponentials is not None:
            factors: Doubles = np.exp(np.minimum(offsets, _LARGEST))
            return self.exponentials * factors[:, None]
        weights: Doubles = np.exp(np.minimum(self.scaled + offsets[:, None], _LARGEST))
        return weights

    def together(self, tokens: list[int]) -> Doubles:
        """Returns the log of the summed weights of some tokens without bias, ``[n]``."""
        if self.exponentials is not None:
            summed: Doubles = np.log(self.exponentials[tokens].sum(axis=0))
            return summed
        moving = self.scaled[tokens]
        highest = moving.max(axis=0)
        log_sum: Doubles = np.log(np.exp(moving - highest).sum(axis=0)) + highest
        return log_sum


class SampleRule:
    """A calibration at one temperature, laid out for solving. Immutable.

    Attributes:
        temperature: Above 0.
        groups: Each category's prompts, columns by the category's own margin, falling.
        benign: The benign prompts.
    """

    def __init__(self, layout: Layout[np.float32], temperature: float) -> None:
        self.temperature = temperature
        self._layout = layout
        self._all = _Prompts.at(layout.scores, temperature)
        starts, count = layout.starts.tolist(), len(layout.groups)
        own = self._all.count - layout.benign.shape[1]
        self._own = self._all.part(0, own)
        ends = [*starts[1:count], own]
        self.groups = [self._all.part(a, b) for a, b in zip(starts[:count], ends, strict=True)]
        self.benign = self._all.part(own, self._all.count)

    def shares(self, bias: Doubles) -> Doubles:
        """Returns which share any token refuses: of each category's prompts, and of the benign."""
        weights = self._all.weights(bias / self.temperature)
        refused = weights / (1 + weights)
        return np.add.reduceat(refused, self._layout.starts) / self._layout.sizes

    def own_falses(self, bias: Doubles) -> Doubles:
        """Returns the share of the benign prompts that each category refuses with others off."""
        weights = self.benign.each(bias / self.temperature)
        shares: Doubles = (weights / (1 + weights)).sum(axis=1) / self.benign.count
        return shares

    def rate(self, category: int, bias: Doubles) -> float:
        """Returns the expected share of a category's prompts that any token refuses."""
        return self._share(self.groups[category], bias)

    def total_false(self, bias: Doubles) -> float:
        """Returns the expected share of the benign prompts that any token refuses."""
        return self._share(self.benign, bias)

    def own_false(self, category: int, bias: float) -> float:
        """Returns the share of the benign prompts that a category refuses with the others off."""
        alone = np.full(len(self.groups), -math.inf)
        alone[category] = bias
        return self._share(self.benign, alone)

    def alone(self, category: int, rate: float) -> float:
        """Returns a bias that is near to the one for a rate: where to start."""
        own = self.groups[category].scaled[category]
        return -self.temperature * float(own[min(int(rate * len(own)), len(own) - 1)])

    def own_bias(self, category: int, allowed: float) -> float:
        """Returns the largest bias whose own rule refuses so many benign prompts in expectation."""
        return self._rise(self.benign.scaled[category], 1.0, allowed / self.benign.count)

    def shift(self, free: list[int], bias: Doubles, allowed: float) -> float | None:
        """Returns the largest common bias of the free categories that keeps a total.

        Args:
            free: Indices of the categories that share the bias.
            bias: ``[k]``, what the others have.
            allowed: Number of benign prompts that may be refused in expectation.

        Returns:
            The bias, or none where the others alone refuse more.
        """
        held = bias.copy()
        held[free] = -math.inf
        limit = allowed / self.benign.count
        if self._share(self.benign, held) >= limit:
            return None
        others = 1 + self.benign.weights(held / self.temperature)
        return self._rise(self.benign.together(free), others, limit)

    def span(self, category: int) -> tuple[float, float]:
        """Returns the biases between which a category's rates go from nearly 0 to nearly 1."""
        own = np.concatenate((self.groups[category].scaled[category], self.benign.scaled[category]))
        low, high = np.quantile(own, (0.001, 0.999))
        return -self.temperature * (float(high) + 5), -self.temperature * (float(low) - 5)

    def meet(self, rates: Mapping[int, float], bias: Doubles) -> Doubles:
        """Returns the biases under which every expected rate is as near as it can be.

        The same equilibrium as ``ThresholdRule.meet``: by Newton's method, and where that does not
        arrive by one category at a time.

        Args:
            rates: What is asked for, by category index.
            bias: ``[k]``, what the others have, and where to start; ``alone`` gives a start.
        """
        if any(value == math.inf for c, value in enumerate(bias.tolist()) if c not in rates):
            return self._with(bias, dict.fromkeys(rates, -math.inf))
        # No n prompts tell a rate of 1 from one that is half a prompt less.
        wanted = {
            c: min(rate, 1 - 0.5 / self.groups[c].count) for c, rate in rates.items() if rate > 0
        }
        start = self._with(bias, dict.fromkeys(set(rates) - set(wanted), -math.inf))
        off = [c for c in wanted if bias[c] == -math.inf]
        start = self._with(start, {c: self.alone(c, wanted[c]) for c in off})
        found = self._newton(wanted, start)
        return self._one_by_one(wanted, start) if found is None else found

    def _with(self, bias: Doubles, changed: Mapping[int, float]) -> Doubles:
        copy = bias.copy()
        for c, value in changed.items():
            copy[c] = np.float32(value)
        return copy

    def _share(self, prompts: _Prompts, bias: Doubles) -> float:
        if (bias == math.inf).any():
            return 1.0
        respond = 1 / (1 + prompts.weights(bias / self.temperature))
        return 1 - float(respond.sum()) / prompts.count

    def _newton(self, rates: Mapping[int, float], start: Doubles) -> Doubles | None:
        """Solves in the log-odds of the rates, which are nearly linear in the biases."""
        active, bias = list(rates), start.copy()
        for _ in range(_NEWTON_STEPS):
            if not active:
                return self._checked(rates, active, bias)
            shares, slopes = self._shares_and_slopes(active, bias)
            wanted = np.array([rates[c] for c in active])
            if (abs(shares - wanted) < _TOLERANCE).all():
                return self._checked(rates, active, bias)
            spread = shares * (1 - shares)
            if (spread < _TOLERANCE**2).any():
                return None
            gap = np.log(wanted / (1 - wanted)) - np.log(shares / (1 - shares))
            try:
                step = np.linalg.solve(slopes / spread[:, None], gap)
            except np.linalg.LinAlgError:
                return None
            reach = 4 * max(1.0, self.temperature)
            bias[active] = (bias[active] + np.clip(step, -reach, reach)).astype(np.float32)
            off = [c for c in active if bias[c] < self._lowest(c)]
            bias[off] = -math.inf
            active = [c for c in active if c not in off]
        return None

    def _shares_and_slopes(self, active: list[int], bias: Doubles) -> tuple[Doubles, Doubles]:
        starts = self._layout.starts[: len(self.groups)]
        sizes = self._layout.sizes[: len(self.groups)]
        each = self._own.each(bias / self.temperature)
        respond = 1 / (1 + np.add.reduce(each, axis=0))
        shares = 1 - np.add.reduceat(respond, starts) / sizes
        each *= respond * respond
        slopes = np.add.reduceat(each, starts, axis=1).T / (sizes * self.temperature)[:, None]
        return shares[active], slopes[np.ix_(active, active)]

    def _checked(
        self, rates: Mapping[int, float], active: list[int], bias: Doubles
    ) -> Doubles | None:
        # A dial that was turned off on the way, though the others do not refuse enough.
        off = [c for c in rates if c not in active]
        early = any(self.rate(c, bias) < rates[c] - _TOLERANCE for c in off)
        return None if early else bias

    def _one_by_one(self, rates: Mapping[int, float], bias: Doubles) -> Doubles:
        best, least = bias, math.inf
        for sweep in range(_SWEEPS):
            before = bias.copy()
            for c, rate in rates.items():
                found = self._fit(c, rate, bias)
                if sweep > _SWEEPS // 2 and math.isfinite(found) and math.isfinite(bias[c]):
                    found = (found + bias[c]) / 2
                bias = self._with(bias, {c: found})
            error = max(abs(self.rate(c, bias) - rate) for c, rate in rates.items())
            if error < least:
                best, least = bias, error
            if least < _TOLERANCE or (bias == before).all():
                break
        return best

    def _fit(self, category: int, rate: float, bias: Doubles) -> float:
        group = self.groups[category]
        held = self._with(bias, {category: -math.inf})
        others = 1 + group.weights(held / self.temperature)
        if float((1 - 1 / others).mean()) >= rate:
            return -math.inf
        return self._rise(group.scaled[category], others, rate)

    def _lowest(self, category: int) -> float:
        highest = float(self.groups[category].scaled[category, 0])
        return -self.temperature * (highest + _NEGLIGIBLE)

    def _rise(self, own: Scaled, others: Scaled | float, share: float) -> float:
        """Returns the bias with which a token brings the refused share to a value, hardly less.

        Args:
            own: ``[n]``, the token's margins over the temperature.
            others: ``[n]`` or one number: 1 and the weights of the other tokens.
            share: Above what the others refuse alone, below 1.
        """
        highest = float(own.max())
        low, high = -highest - _FAR, -float(own.min()) + _FAR
        exponentials = np.exp(own - highest) if high - low < _LARGEST else None
        wanted = math.log(share / (1 - share))
        # Where the others refuse nothing, this is it but for the spread of the margins.
        offset = -float(np.partition(own, -1 - int(share * len(own)))[-1 - int(share * len(own))])
        for _ in range(_RISE_STEPS):
            if exponentials is None:
                weights = np.exp(np.minimum(own + offset, _LARGEST))
            else:
                weights = exponentials * math.exp(offset + highest)
            respond = 1 / (others + weights)
            refused = min(max(1 - float(respond.sum()) / len(own), _TINY), 1 - _TINY)
            gap = wanted - math.log(refused / (1 - refused))
            low, high = (offset, high) if gap > 0 else (low, offset)
            slope = float((weights * respond) @ respond) / len(own) / (refused * (1 - refused))
            step = gap / slope if slope > 0 else math.inf
            if not low < offset + step < high:
                step = (low + high) / 2 - offset
            offset += step
            if abs(step) < _RISE_WITHIN:
                break
        return float(np.float32((offset - _SAFE_SIDE) * self.temperature))
