"""The decision against references that know one request at a time and no tensors."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from models.controls import Rule, refused_by_own_rule
from models.decision import Dials, decide, uniform_draw
from tests.models.dialled import BIAS_MIXES, INF, K, dials, fp32, random_logits


def greedy_of(logits: Sequence[Sequence[float]], bias: Sequence[Sequence[float]]) -> list[int]:
    chosen: list[int] = decide(torch.tensor(logits), dials(bias), {Rule.GREEDY}).tolist()
    return chosen


def slow_greedy(logits: Sequence[float], bias: Sequence[float]) -> int:
    """Category by category in plain Python; the columns of ``decide``."""
    margins = [fp32(z - logits[-1]) for z in logits[:-1]]
    forced = [c for c, b in enumerate(bias) if b == INF]
    if forced:
        return max(forced, key=lambda c: (margins[c], -c))
    best = len(bias)
    best_score = -INF
    for c, b in enumerate(bias):
        score = fp32(margins[c] + b)
        if score >= 0 and score > best_score:
            best, best_score = c, score
    return best


def test_greedy_is_the_slow_reference_under_every_mix_of_biases() -> None:
    logits = random_logits(200, seed=0)
    cases = list(itertools.product(logits, BIAS_MIXES))
    chosen = greedy_of([z for z, _ in cases], [b for _, b in cases])
    assert chosen == [slow_greedy(z, b) for z, b in cases]
    assert set(chosen) == {0, 1, 2, 3}


def test_greedy_by_hand() -> None:
    #         margins: -1, -2, 0.5
    z = [1.0, 0.0, 2.5, 2.0]
    biases = [
        (0.0, 0.0, 0.0),
        (0.0, 0.0, -0.6),
        (1.6, 0.0, 0.0),
        (1.0, 2.0, -9.0),
        (0.9, 1.9, -9.0),
        (INF, INF, -INF),
        (-INF, -INF, -INF),
        (-INF, INF, 50.0),
    ]
    assert greedy_of([z] * len(biases), biases) == [2, 3, 0, 0, 3, 0, 3, 1]


def test_ties_refuse_in_manifest_order() -> None:
    zero = [0.0] * (K + 1)
    biases = [(0.0, 0.0, 0.0), (-1.0, 0.0, 0.0), (-1.0, -1.0, 0.0), (-1.0, -1.0, -1.0)]
    assert greedy_of([zero] * 4, biases) == [0, 1, 2, 3]
    assert greedy_of([zero] * 2, [(INF, INF, INF), (-INF, INF, INF)]) == [0, 1]
    assert greedy_of([[2.0, 1.0, 0.0, 2.0]], [(0.0, 1.0, 2.0)]) == [0]


def test_refused_is_the_union_of_the_categories_own_rules() -> None:
    cases = list(itertools.product(random_logits(200, seed=1), BIAS_MIXES))
    chosen = greedy_of([z for z, _ in cases], [b for _, b in cases])
    for (z, bias), choice in zip(cases, chosen, strict=True):
        margins = [fp32(x - z[-1]) for x in z[:-1]]
        assert (choice < K) is any(refused_by_own_rule(margins, bias))


def test_greedy_is_monotone_in_every_bias() -> None:
    steps = [-INF, -20.0, -2.0, -0.5, 0.0, 0.25, 1.0, 5.0, 20.0, INF]
    others = [-INF, -1.0, 0.0, 2.0, INF]
    for c in range(K):
        for z, rest in itertools.product(
            random_logits(20, seed=2), itertools.product(others, repeat=K - 1)
        ):
            sweep = [(*rest[:c], step, *rest[c:]) for step in steps]
            chosen = greedy_of([z] * len(steps), sweep)
            own = [choice == c for choice in chosen]
            refused = [choice < K for choice in chosen]
            assert own == sorted(own)
            assert refused == sorted(refused)


def test_a_dial_takes_no_refusal_of_another_category_but_for_its_own() -> None:
    """Raising one bias either changes nothing or chooses that category."""
    logits = random_logits(300, seed=3)
    rng = random.Random(3)
    biases = [[fp32(rng.gauss(0, 2)) for _ in range(K)] for _ in logits]
    before = greedy_of(logits, biases)
    for c in range(K):
        raised = [[x + 1.5 if i == c else x for i, x in enumerate(b)] for b in biases]
        after = greedy_of(logits, raised)
        changed = [new for old, new in zip(before, after, strict=True) if old != new]
        assert set(changed) == {c}


def test_shift_of_the_other_categories_does_not_move_with_a_dial() -> None:
    base, moved = dials([(0.0, 0.0, 0.0)]).shift, dials([(0.0, 3.0, 0.0)]).shift
    assert torch.equal(moved[:, [0, 2, 3]], base[:, [0, 2, 3]])
    assert bool((base[:, -1] == 0).all())


@pytest.mark.parametrize("common", [1e4, -1e4])
def test_extreme_logits_keep_their_margins(common: float) -> None:
    # 1e4 and a quarter are fp32 numbers; exp(1e4) is none.
    z = [common - 0.25, common - 0.5, common + 0.25, common]
    biases = [(0.0, 0.0, 0.0), (0.0, 0.5, -0.5), (0.0, 0.0, -0.5), (0.25, 0.0, -1.0)]
    assert greedy_of([z] * 4, biases) == [2, 1, 3, 0]
    sampled = decide(
        torch.tensor([z] * 2),
        dials([(0.0,) * K] * 2, Rule.SAMPLE, uniform=[0.0, 1 - 2**-22]),
        {Rule.SAMPLE},
    )
    assert sampled.tolist() == [0, 3]


@pytest.mark.parametrize("rule", list(Rule))
def test_opposite_extremes_are_finite_decisions(rule: Rule) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, -1e4], [-1e4, -1e4, -1e4, 1e4], [-1e4, 0.0, 1e4, 0.0]])
    chosen = decide(
        logits,
        dials([(0.0,) * K] * 3, rule, uniform=0.5),
        {rule},
        logits.logsumexp(dim=-1),
    )
    assert chosen.tolist() == [0, 3, 2]


def test_bias_beyond_fp32_is_always_or_never() -> None:
    assert greedy_of([[0.0, 0.0, 0.0, 50.0]], [(1e39, -1e39, 0.0)]) == [0]
    assert greedy_of([[50.0, 0.0, 0.0, 0.0]], [(-1e39, -1.0, -1.0)]) == [3]


def test_bf16_logits_decide_as_their_exact_values_do() -> None:
    # In bf16 the probabilities of 8 and 8.0625 below saturate to the same number.
    logits = torch.tensor(random_logits(500, seed=5, scale=12.0)).bfloat16().float()
    biases = [BIAS_MIXES[i % len(BIAS_MIXES)] for i in range(500)]
    chosen = greedy_of(logits.tolist(), biases)
    assert chosen == [slow_greedy(z, b) for z, b in zip(logits.tolist(), biases, strict=True)]
    close = torch.tensor([[8.0, 8.0625, -20.0, 8.0]]).bfloat16().float()
    assert greedy_of(close.tolist(), [(0.0, 0.0, 0.0)]) == [1]
    assert greedy_of(close.tolist(), [(0.0, -0.0625, 0.0)]) == [0]


def slow_probabilities(
    logits: Sequence[float], bias: Sequence[float], temperature: float
) -> list[float]:
    forced = INF in bias
    scores = [
        z if b == INF else -INF if forced else z + b for z, b in zip(logits, bias, strict=False)
    ]
    scores.append(-INF if forced else logits[-1])
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


DRAWS = [uniform_draw(seed) for seed in range(20_000)]


def sample_counts(z: Sequence[float], bias: Sequence[float], temperature: float) -> Counter[int]:
    rows = len(DRAWS)
    drawn = decide(
        torch.tensor([z] * rows),
        dials([bias] * rows, Rule.SAMPLE, temperature=temperature, uniform=DRAWS),
        {Rule.SAMPLE},
    )
    return Counter(drawn.tolist())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    "bias",
    [(0.0, 0.0, 0.0), (1.5, -2.0, 0.5), (-INF, 1.0, 0.0), (INF, INF, 3.0), (-INF, -INF, 0.25)],
)
def test_sample_follows_the_softmax(bias: tuple[float, ...], temperature: float) -> None:
    z = [0.5, -0.25, 1.0, 0.75]
    counts = sample_counts(z, bias, temperature)
    n = len(DRAWS)
    for column, p in enumerate(slow_probabilities(z, bias, temperature)):
        # Five binomial standard deviations: one false alarm in about two million.
        assert abs(counts[column] - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-6 * n
        assert p > 0 or counts[column] == 0


@pytest.mark.parametrize("uniform", [0.0, 2**-22, 0.5, 1 - 2**-22])
def test_sample_keeps_always_and_never_at_the_ends_of_the_draw(uniform: float) -> None:
    # The model is all but certain of the opposite.
    cases = [
        ([-50.0, 9.0, 9.0, 50.0], (INF, 0.0, 0.0), {0}),
        ([-50.0, 9.0, -60.0, 50.0], (INF, 0.0, INF), {0, 2}),
        ([50.0, 50.0, 50.0, -50.0], (-INF, -INF, -INF), {3}),
        ([50.0, -50.0, 50.0, -50.0], (-INF, 0.0, -INF), {1, 3}),
        ([0.0, 0.0, 0.0, 0.0], (-INF, INF, -INF), {1}),
    ]
    for z, bias, allowed in cases:
        chosen = decide(
            torch.tensor([z]), dials([bias], Rule.SAMPLE, uniform=uniform), {Rule.SAMPLE}
        )
        assert set(chosen.tolist()) <= allowed


def test_sample_at_temperature_zero_is_greedy() -> None:
    cases = list(itertools.product(random_logits(40, seed=6), BIAS_MIXES))
    logits = torch.tensor([z for z, _ in cases])
    biases = [b for _, b in cases]
    drawn = decide(
        logits,
        dials(biases, Rule.SAMPLE, temperature=0.0, uniform=DRAWS[: len(cases)]),
        {Rule.SAMPLE},
    )
    assert drawn.tolist() == [slow_greedy(z, b) for z, b in cases]


def test_raising_a_bias_never_turns_a_refusal_into_an_answer_for_the_same_draw() -> None:
    steps = [-INF, -8.0, -3.0, -1.0, -0.01, 0.0, 0.01, 0.5, 2.0, 6.0, 14.0, 30.0, INF]
    rng = random.Random(7)
    draws = [0.0, 2**-22, 1 - 2**-22, *DRAWS[:60]]
    for z in random_logits(25, seed=7):
        rest = [rng.choice([-INF, -2.0, 0.0, 1.0]) for _ in range(K - 1)]
        temperature = rng.choice([0.05, 0.7, 1.0, 3.0])
        for c in range(K):
            sweep = [(*rest[:c], step, *rest[c:]) for step in steps]
            pairs = list(itertools.product(draws, sweep))
            chosen = decide(
                torch.tensor([z] * len(pairs)),
                dials(
                    [bias for _, bias in pairs],
                    Rule.SAMPLE,
                    temperature=temperature,
                    uniform=[draw for draw, _ in pairs],
                ),
                {Rule.SAMPLE},
            )
            refused = (chosen < K).reshape(len(draws), len(steps)).int()
            assert bool((refused.diff(dim=1) >= 0).all())


def test_uniform_draw_is_fixed_by_its_seed_and_lies_on_its_grid() -> None:
    assert DRAWS[:50] == [uniform_draw(seed) for seed in range(50)]
    assert len(set(DRAWS)) > 19_900
    assert all(0 <= draw < 1 and (draw * 2**22).is_integer() for draw in DRAWS)
    assert all(fp32(draw) == draw for draw in DRAWS)
    assert sum(DRAWS) / len(DRAWS) == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(DRAWS)))


def test_mixed_rules_in_one_batch_decide_as_each_does_alone_in_any_order() -> None:
    rng = random.Random(9)
    n = 120
    logits = torch.tensor(random_logits(n, seed=9))
    normaliser = logits.logsumexp(dim=-1) + 0.3
    rules = [Rule(i % 3) for i in range(n)]
    block = dials(
        [rng.choice(BIAS_MIXES) for _ in range(n)],
        rules,
        selected=[[rng.random() < 0.5 for _ in range(K)] for _ in range(n)],
        temperature=[rng.choice([0.0, 0.5, 1.0]) for _ in range(n)],
        uniform=DRAWS[:n],
    )
    together = decide(logits, block, set(Rule), normaliser)
    for i, rule in enumerate(rules):
        row = Dials(block.rows[i : i + 1], K)
        alone = decide(logits[i : i + 1], row, {rule}, normaliser[i : i + 1])
        assert alone.item() == together[i].item()
    order = torch.tensor(rng.sample(range(n), n))
    shuffled = decide(logits[order], Dials(block.rows[order], K), set(Rule), normaliser[order])
    assert torch.equal(shuffled, together[order])


def test_no_rows_is_no_decision() -> None:
    empty = dials([(0.0,) * K])
    chosen = decide(torch.zeros(0, K + 1), Dials(empty.rows[:0], K), set(Rule), torch.zeros(0))
    assert chosen.tolist() == []


def test_inputs_are_not_changed() -> None:
    logits = torch.tensor(random_logits(4, seed=10))
    block = dials([(INF, 0.0, -INF)] * 4, Rule.SAMPLE, temperature=[0.0, 0.5, 1.0, 2.0])
    before = [logits.clone(), block.rows.clone()]
    decide(logits, block, set(Rule), logits.logsumexp(dim=-1))
    assert all(torch.equal(a, b) for a, b in zip(before, [logits, block.rows], strict=True))
