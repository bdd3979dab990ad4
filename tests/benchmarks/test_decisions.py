"""The losses' benchmark on decisions: its metric, its models, its search."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.losses.decisions import LOSSES, area, as_markdown, run
from benchmarks.losses.networks import Candidate, Samples, train
from benchmarks.losses.noise import FLEXIBLE
from loss import members


def _rows(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, count)
    states = generator.normal(0, 1, (count, 6))
    states[np.arange(count), labels] += 2.5
    return states, labels


def test_area_is_that_of_refused_against_answered() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 50, 3, generator=generator)
    labels = torch.randint(0, 3, (1, 50), generator=generator)

    areas = area(logits, labels)

    for at in range(2):
        score = logits[0, at, :, :2].amax(-1) - logits[0, at, :, 2]
        assert areas[0, at] == pytest.approx(roc_auc_score(labels[0] != 2, score))


def test_linear_models_learn_and_differ_by_their_loss() -> None:
    states, labels = _rows()
    rows = Samples(torch.tensor(states, dtype=torch.float32)[None], torch.tensor(labels)[None])
    candidates = [Candidate(0.05, members.CROSS_ENTROPY), Candidate(0.0, members.CROSS_ENTROPY)]

    trained = train([candidates], rows, rows, 3, [0], 60, hidden=False, measure=area)

    areas = area(trained.logits, rows.y)[0]
    assert areas[0] > 0.95
    assert not trained.logits[0, 1].any()


def test_table_has_every_loss_with_right_and_wrong_labels() -> None:
    states, labels = _rows()
    results = {f"{noise:.0%}": run(states, labels, noise, [0, 1], 20) for noise in (0.0, 0.2)}

    table = as_markdown(results, [*LOSSES, FLEXIBLE], "note")

    assert table.count("| flexible, auto |") == 2
    assert results["0%"].metrics["auc"].shape == (2, len(LOSSES) + 1)
    assert results["0%"].metrics["auc"].mean() > results["20%"].metrics["auc"].mean() - 0.1
