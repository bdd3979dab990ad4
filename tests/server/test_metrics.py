from prometheus_client import REGISTRY

from models.controls import Rule
from server import metrics


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"rheostat_{name}_total", labels) or 0.0


def test_refusals_and_asked_rates_share_their_denominator() -> None:
    asked = (("metrics-a", 0.25), ("metrics-b", 0.5))
    outcomes = ["metrics-a", None, "metrics-b", "metrics-b", "metrics-c", None]
    for category in outcomes:
        metrics.count_decision(category, rule=Rule.GREEDY, asked_rates=asked, waited_s=0.1)
    for category, refusals, rate in (("metrics-a", 1, 1.5), ("metrics-b", 2, 3.0)):
        labels = {"policy": "default", "category": category}
        assert value("rate_choices", **labels) == 6
        assert value("rate_refusals", **labels) == refusals
        assert value("asked_rate", **labels) == rate
    assert value("rate_choices", policy="default", category="metrics-c") == 0


def test_dials_without_a_rate_are_not_compared_with_one() -> None:
    metrics.count_decision("metrics-d", rule=Rule.PAPER, asked_rates=(), waited_s=0.1)
    assert value("rate_choices", policy="default", category="metrics-d") == 0
    assert value("decisions", decision="refuse", category="metrics-d", rule="paper") == 1
