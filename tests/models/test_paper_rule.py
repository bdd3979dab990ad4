"""The released rule of the refusal-token paper, against a slow reference."""

import math
import random
from collections.abc import Sequence

import pytest
import torch

from models.controls import Rule, bias_of_sensitivity
from models.decision import decide
from tests.models.dialled import INF, K, dials, fp32


def slow_paper(
    vocabulary: Sequence[float], sensitivity: Sequence[float], selected: Sequence[bool]
) -> int:
    """The released rule on probabilities over the whole vocabulary (FACTS, section 2).

    The control tokens are the first entries of the vocabulary, the respond token the last of them.
    """
    k = len(sensitivity)
    top = max(vocabulary)
    total = math.fsum(math.exp(z - top) for z in vocabulary)
    p = [math.exp(z - top) / total for z in vocabulary]
    best = 0
    for c in range(1, k):
        if p[c] > p[best]:
            best = c
    if not selected[best]:
        return best if p[best] >= p[k] else k
    threshold = 1 - sensitivity[best]
    if sensitivity[best] == 0:
        return k
    return best if p[best] >= threshold else k


def test_paper_rule_is_the_slow_reference() -> None:
    rng = random.Random(8)
    words = [0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0]
    vocabularies, sensitivities, selections = [], [], []
    expected: list[int] = []
    while len(expected) < 3000:
        vocabulary = [fp32(rng.gauss(0, 2.5)) for _ in range(12)]
        sensitivity = [rng.choice(words) for _ in range(K)]
        selected = [rng.random() < 0.6 for _ in range(K)]
        p = torch.tensor(vocabulary, dtype=torch.float64).softmax(0)[:K].max().item()
        if min(abs(p - (1 - x)) for x in words) < 1e-5:
            continue  # closer to a threshold than fp32 resolves
        vocabularies.append(vocabulary)
        sensitivities.append(sensitivity)
        selections.append(selected)
        expected.append(slow_paper(vocabulary, sensitivity, selected))
    whole = torch.tensor(vocabularies)
    biases = [[bias_of_sensitivity(x) for x in row] for row in sensitivities]
    chosen = decide(
        whole[:, : K + 1],
        dials(biases, Rule.PAPER, selected=selections),
        {Rule.PAPER},
        whole.logsumexp(dim=-1),
    )
    assert chosen.tolist() == expected
    assert set(expected) == {0, 1, 2, 3}


def paper_of(
    z: Sequence[float],
    sensitivity: Sequence[float],
    selected: Sequence[bool],
    rest: float = -INF,
) -> int:
    """``rest`` is the log-sum-exp of all that is no control token."""
    logits = torch.tensor([z])
    normaliser = torch.logaddexp(logits.logsumexp(dim=-1), torch.tensor(rest))
    bias = [bias_of_sensitivity(x) for x in sensitivity]
    row = dials([bias], Rule.PAPER, selected=[selected])
    return int(decide(logits, row, {Rule.PAPER}, normaliser).item())


YES = (True, True, True)


def test_paper_threshold_is_on_the_probability_over_the_whole_vocabulary() -> None:
    # p = 0.4, 0.1, 0.1, 0.2 and 0.2 elsewhere
    z = [math.log(p) for p in (0.4, 0.1, 0.1, 0.2)]
    rest = math.log(0.2)
    assert paper_of(z, (0.61, 0.5, 0.5), YES, rest) == 0  # T = 0.39
    assert paper_of(z, (0.59, 0.5, 0.5), YES, rest) == 3  # T = 0.41
    # without the rest p_0 is 0.5
    assert paper_of(z, (0.51, 0.5, 0.5), YES) == 0
    assert paper_of(z, (0.49, 0.5, 0.5), YES) == 3


def test_paper_threshold_zero_refuses_and_one_never_does() -> None:
    z = [-30.0, -40.0, -40.0, 0.0]
    assert paper_of(z, (1.0, 0.0, 0.0), YES) == 0
    assert paper_of([60.0, 0.0, 0.0, 0.0], (0.0, 1.0, 1.0), YES) == 3


def test_paper_leaves_unselected_categories_to_the_models_own_choice() -> None:
    assert paper_of([2.0, 0.0, 0.0, 1.0], (0.0, 1.0, 1.0), (False, True, True)) == 0
    assert paper_of([1.0, 0.0, 0.0, 2.0], (1.0, 1.0, 1.0), (False, True, True)) == 3
    # a selected category that is ranked second never fires
    assert paper_of([1.0, 0.9, 0.0, 2.0], (0.5, 1.0, 0.5), (False, True, False)) == 3


def test_paper_ties_go_to_the_first_category_and_to_refusal() -> None:
    assert paper_of([1.0, 1.0, 0.0, 1.0], (1.0, 1.0, 1.0), YES) == 0
    assert paper_of([1.0, 1.0, 0.0, 1.0], (0.0, 1.0, 1.0), YES) == 3
    assert paper_of([1.0, 0.0, 0.0, 1.0], (0.0, 0.0, 0.0), (False, True, True)) == 0
    # p_0 is exactly T = 0.5
    assert paper_of([0.0, -INF, -INF, 0.0], (0.5, 0.5, 0.5), YES) == 0


def test_paper_wants_the_normaliser() -> None:
    with pytest.raises(ValueError, match="normaliser"):
        decide(torch.zeros(1, K + 1), dials([(0.0,) * K], Rule.PAPER), {Rule.PAPER})
