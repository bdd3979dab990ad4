"""The batched trainings against one plain network at a time; the report's arithmetic by hand."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from benchmarks.losses.label_noise import (
    Interval,
    as_markdown,
    interval,
    paces,
    ratio_to_first,
)
from benchmarks.losses.networks import HIDDEN, Candidate, ranking, train
from benchmarks.losses.noise import (
    BUDGETS,
    FAMILY,
    NAMES,
    SEARCH,
    STATIC,
    TRIALS,
    Job,
    Outcome,
    problem,
    run,
)
from loss.flexible import flexible_loss
from loss.members import CROSS_ENTROPY, Member

SEEDS = (3, 8)
ROWS = [
    [Candidate(0.01, CROSS_ENTROPY), Candidate(0.003, Member(0.7, 0.5))],
    [Candidate(0.02, Member(1.0, 1.0)), Candidate(0.01, Member(-0.5, 0.0))],
]


def plain(x: torch.Tensor, y: torch.Tensor, classes: int, seed: int, one: Candidate) -> nn.Module:
    """One network, with torch's own layers and Adam; each batch is all rows."""
    features = x.shape[1]
    first, second = nn.Linear(features, HIDDEN), nn.Linear(HIDDEN, classes)
    model = nn.Sequential(first, nn.ReLU(), second)
    with torch.no_grad():
        for layer, (rows, columns) in (
            (first, (features, HIDDEN)),
            (second, (HIDDEN, classes)),
        ):
            generator = torch.Generator().manual_seed(seed)
            start = torch.randn(rows, columns, generator=generator) * math.sqrt(2 / rows)
            layer.weight.copy_(start.T)
            layer.bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=one.lr)
    for _ in range(7):
        log_probs = model(x).log_softmax(-1)[torch.arange(len(y)), y]
        optimizer.zero_grad()
        torch.autograd.backward(flexible_loss(log_probs, *one.member).mean())
        optimizer.step()
    return model


def test_batched_networks_train_as_each_alone() -> None:
    posed = problem("wine", 0.2, SEEDS)
    few = posed.inner._replace(x=posed.inner.x[:, :50], y=posed.inner.y[:, :50])
    together = train(ROWS, few, posed.test, posed.classes, SEEDS, 7)
    for s, seed in enumerate(SEEDS):
        for c, one in enumerate(ROWS[s]):
            # 50 rows are less than a batch: every batch is all of them, and order is no matter.
            alone = plain(few.x[s], few.y[s], posed.classes, seed, one)
            expected = alone(posed.test.x[s])
            torch.testing.assert_close(together.logits[s, c], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_only_training_labels_are_wrong_and_as_many_as_asked(noise: float) -> None:
    seeds = tuple(range(5))
    clean, spoilt = problem("digits", 0.0, seeds), problem("digits", noise, seeds)
    assert spoilt.test.y.equal(clean.test.y)
    assert spoilt.train.x.equal(clean.train.x)
    for part in ("inner", "validation", "train"):
        before, after = getattr(clean, part).y, getattr(spoilt, part).y
        assert (before != after).double().mean().item() == pytest.approx(noise, abs=0.04)


def test_inner_parts_are_the_training_part() -> None:
    posed = problem("breast cancer", 0.2, SEEDS)
    both = torch.cat([posed.validation.y, posed.inner.y], 1)
    assert both.equal(posed.train.y)


def test_ranking_is_the_area_under_the_curve() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 40, 4, generator=generator)
    y = torch.randint(4, (2, 40), generator=generator)
    found = ranking(logits, y)
    for s in range(2):
        for c in range(3):
            each = [
                roc_auc_score((y[s] == k).numpy(), logits[s, c].softmax(-1)[:, k].numpy())
                for k in range(4)
            ]
            assert found[s, c].item() == pytest.approx(float(np.mean(each)))


def test_ranking_without_rows_of_a_class_is_one_half_for_it() -> None:
    assert ranking(torch.randn(1, 1, 5, 2), torch.zeros(1, 5, dtype=torch.int64)).item() == 0.5


def test_every_loss_is_tuned_at_equal_cost() -> None:
    assert all(len(set(own)) == TRIALS for own in STATIC.values())
    assert len(set(SEARCH)) == len(SEARCH)
    assert CROSS_ENTROPY in FAMILY
    job = Job("wine", 0.4, (0, 1), 18)
    outcome = run(job)
    assert max(outcome.search_steps) <= TRIALS * job.steps + 1e-9
    assert min(outcome.search_steps) >= len(SEARCH) * BUDGETS[0] * job.steps
    for row in outcome.chosen:
        assert all(one in own for one, own in zip(row, STATIC.values(), strict=False))
        assert row[-1] in SEARCH
    assert outcome.curves.shape == (2, len(NAMES), 3)


def test_seeds_do_not_depend_on_those_beside_them() -> None:
    together, alone = run(Job("wine", 0.4, (0, 1), 12)), run(Job("wine", 0.4, (1,), 12))
    assert together.chosen[1] == alone.chosen[0]
    np.testing.assert_allclose(together.curves[1], alone.curves[0], atol=0.02)


def test_interval_by_hand() -> None:
    # Mean 2, deviation 1, t(2) = 4.302653: half-width 4.302653 / sqrt(3).
    assert interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((2.0, 2.484138))
    assert Interval(-0.5, 0.5).covers_0()
    assert not Interval(0.6, 0.5).covers_0()


def test_pace_by_hand() -> None:
    curves = np.array([[0.5, 0.7, 0.9, 0.8], [0.9, 0.2, 0.2, 0.2], [0.1, 0.2, 0.8, 0.89]])
    assert ratio_to_first(curves).tolist() == [1.0, pytest.approx(1 / 3), math.inf]
    found = paces(np.stack([curves] * 5))
    assert [tuple(pace) for pace in found] == [
        (1.0, 1.0, 1.0),
        pytest.approx((1 / 3,) * 3),
        (math.inf,) * 3,
    ]


def test_report_tells_what_wins_and_what_loses() -> None:
    names = ["cross-entropy", "MAE", "flexible, auto"]
    noise = np.random.default_rng(0).normal(0, 0.01, (10, 1, 1))
    curves = np.array([[0.5, 0.8], [0.6, 0.7], [0.8, 0.9]]) + noise
    row = [
        Candidate(0.1, CROSS_ENTROPY),
        Candidate(0.1, Member(1, 0)),
        Candidate(0.1, Member(0.7, 0)),
    ]
    setting = Outcome(curves, [row] * 10, [100.0] * 10)
    text, record = as_markdown({"wine, 40%": setting}, names, 5, "How.")
    assert "| wine, 40% | cross-entropy | +10.0 ± 0.0 | better | (0.7, 0) 10 times |" in text
    assert "| wine, 40% | 10 | never (never to never) | 0.50 (0.50 to 0.50) |" in text
    assert "-10.0 ± 0.0 | +10.0 ± 0.0" in text
    assert record["settings"]["wine, 40%"]["losses"]["MAE"]["pace"]["ratio"] is None
    json.dumps(record, allow_nan=False)
