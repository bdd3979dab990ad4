"""What the overhead benchmark makes of its rounds."""

import numpy as np
import pytest
from rich.console import Console

from benchmarks.overhead.__main__ import OTHER, OURS, REPORTED, STOCK, estimate, show


def test_interval_tells_how_much_starts_differ() -> None:
    starts = np.array([[0.9] * 24, [1.0] * 24, [1.1] * 24])

    assert estimate(starts) == pytest.approx((1.0, 0.9, 1.1))


def test_interval_tells_how_much_rounds_differ_where_starts_are_alike() -> None:
    rounds = np.linspace(0.9, 1.1, 101)

    found = estimate(np.array([rounds] * 5))

    assert found.median == pytest.approx(1.0)
    assert 0.97 < found.low < 1.0 < found.high < 1.03


def test_rounds_are_compared_one_by_one() -> None:
    stock = np.array([[100.0, 50.0, 200.0]])
    per_s = {STOCK: stock, OURS: stock * 0.9, REPORTED: stock * 0.45}
    alone = {STOCK: 1000 / stock, OURS: 1000 / stock + 1, REPORTED: 1000 / stock + 3}

    results = show(Console(quiet=True), per_s, alone)

    compared = results[f"{OURS} / {STOCK}"]
    assert compared["throughput_ratio"]["median"] == pytest.approx(0.9)
    assert compared["added_ms"].pop("starts") == pytest.approx([1.0])
    assert list(compared["added_ms"].values()) == pytest.approx([1.0] * 3)
    assert results[f"{REPORTED} / {OURS}"]["throughput_ratio"]["starts"] == pytest.approx([0.5])
    assert f"{OURS} / {OTHER}" not in results


def test_other_checkout_is_compared_where_there_is_one() -> None:
    stock = np.array([[100.0, 50.0]])
    per_s = {STOCK: stock, OURS: stock, REPORTED: stock, OTHER: stock * 2}

    results = show(Console(quiet=True), per_s, {name: 1000 / rate for name, rate in per_s.items()})

    assert results[f"{OURS} / {OTHER}"]["throughput_ratio"]["median"] == pytest.approx(0.5)
    assert results[f"{OTHER} / {STOCK}"]["throughput_ratio"]["median"] == pytest.approx(2)
