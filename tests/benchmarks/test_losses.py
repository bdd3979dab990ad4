"""The textbook losses that the table compares with, and the search for the nearest member."""

import math

import pytest
import torch

from benchmarks.losses.__main__ import (
    EXACT,
    MARGINS,
    NEAR,
    PROBABILITIES,
    Near,
    bi_tempered,
    differences,
    nearest,
    poly,
)
from loss.flexible import flexible_loss


def test_nearest_finds_a_member_that_is_there() -> None:
    curve = 3.0 * flexible_loss(PROBABILITIES.log(), 0.4, 1.2)
    fit = nearest(Near(lambda p: curve, on_margin=False))
    assert (fit.q, fit.gamma, fit.scale) == pytest.approx((0.4, 1.2, 3.0), abs=1e-3)
    assert fit.largest < 1e-4


def test_nearest_tells_how_far_away_it_is() -> None:
    # A constant c is no member; the distance is measured, not assumed.
    fit = nearest(Near(torch.ones_like, on_margin=True))
    log_p = torch.nn.functional.logsigmoid(MARGINS)
    off = fit.scale * flexible_loss(log_p, fit.q, fit.gamma) - 1
    assert fit.rms == pytest.approx(off.square().mean().sqrt().item())
    assert fit.relative == pytest.approx(fit.rms)
    assert fit.rms > 0.3


def test_bi_tempered_towards_both_temperatures_of_1_is_logistic() -> None:
    m = torch.linspace(-3, 3, 7, dtype=torch.float64)
    found = bi_tempered(m, t1=1 - 1e-6, t2=1 + 1e-6)
    torch.testing.assert_close(found, torch.log1p(torch.exp(-m)), rtol=1e-4, atol=1e-4)


def test_near_losses_by_hand() -> None:
    one = torch.tensor([0.25], dtype=torch.float64)
    assert NEAR["hinge"].curve(one).item() == 0.75
    assert NEAR["squared hinge"].curve(one).item() == 0.5625
    assert NEAR["softmax-MSE, 2 classes"].curve(one).item() == 1.125
    assert NEAR["softmax-MSE, 10 classes, rest spread"].curve(one).item() == pytest.approx(0.625)
    assert poly(2.0)(one).item() == pytest.approx(math.log(4) + 1.5)


@pytest.mark.parametrize("name", EXACT)
def test_exact_members_hold_to_a_millionth_in_float32(name: str) -> None:
    assert max(differences(EXACT[name], torch.float32, seed=7)) < 1e-6
