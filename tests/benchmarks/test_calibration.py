import pytest

from benchmarks.calibration.experiment import bound_holds, chance_kept
from tests.models.margins import random_calibration


@pytest.mark.parametrize(("benign", "bound"), [(300, 0.05), (160, 0.1)])
def test_halvings_keep_a_bound_as_often_as_they_must(benign: int, bound: float) -> None:
    prompts = random_calibration(0, k=1, prompts=80, benign=benign)
    found = bound_holds(prompts, 400, bound, 2, "humanizing")
    assert found["chance"] == chance_kept(prompts, bound)
    assert found["chance"] >= 0.95
    spread = (found["chance"] * (1 - found["chance"]) / 400) ** 0.5
    assert found["kept"] / 400 > found["chance"] - 4 * spread
