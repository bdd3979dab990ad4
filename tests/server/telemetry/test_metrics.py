import subprocess
import sys

from prometheus_client import REGISTRY

from models.controls import Rule
from server.dials.floors import Side
from server.telemetry import metrics


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"rheostat_{name}_total", {"model_name": "", **labels}) or 0.0


def count(
    category: str | None,
    *,
    rule: Rule = Rule.GREEDY,
    asked_rates: tuple[tuple[str, float], ...] = (),
    policy: str = "default",
    clamped: tuple[tuple[str, Side], ...] = (),
) -> None:
    metrics.count_decision(
        category,
        rule=rule,
        asked_rates=asked_rates,
        waited_s=0.1,
        policy=policy,
        clamped=clamped,
    )


def test_refusals_and_asked_rates_share_their_denominator() -> None:
    asked = (("metrics-a", 0.25), ("metrics-b", 0.5))
    outcomes = ["metrics-a", None, "metrics-b", "metrics-b", "metrics-c", None]
    for category in outcomes:
        count(category, asked_rates=asked)
    for category, refusals, rate in (("metrics-a", 1, 1.5), ("metrics-b", 2, 3.0)):
        labels = {"policy": "default", "category": category}
        assert value("rate_choices", **labels) == 6
        assert value("rate_refusals", **labels) == refusals
        assert value("asked_rate", **labels) == rate
    assert value("rate_choices", policy="default", category="metrics-c") == 0


def test_dials_without_a_rate_are_not_compared_with_one() -> None:
    count("metrics-d", rule=Rule.PAPER)
    assert value("rate_choices", policy="default", category="metrics-d") == 0
    labels = {"decision": "refuse", "category": "metrics-d", "rule": "paper", "policy": "default"}
    assert value("decisions", **labels) == 1


def test_refusals_that_are_not_enforced_are_counted_apart() -> None:
    metrics.count_decision(
        "metrics-g",
        rule=Rule.GREEDY,
        asked_rates=(),
        waited_s=0.1,
        policy="metrics-shadow",
        enforced=False,
    )
    labels = {"category": "metrics-g", "rule": "greedy", "policy": "metrics-shadow"}
    assert value("decisions", decision="would_refuse", **labels) == 1
    assert value("decisions", decision="refuse", **labels) == 0


def test_dials_at_a_bound_are_counted_by_policy() -> None:
    clamped: tuple[tuple[str, Side], ...] = (("metrics-e", "floor"), ("metrics-f", "ceiling"))
    count(None, policy="metrics-desk", clamped=clamped)
    count("metrics-e", policy="metrics-desk", clamped=clamped[:1])
    labels = {"policy": "metrics-desk", "category": "metrics-e", "bound": "floor"}
    assert value("clamped_dials", **labels) == 2
    labels = {"policy": "metrics-desk", "category": "metrics-f", "bound": "ceiling"}
    assert value("clamped_dials", **labels) == 1


def test_reloads_are_counted_and_the_last_one_says_whether_the_file_is_valid() -> None:
    before = value("policy_reloads", result="ok"), value("policy_reloads", result="bad")
    metrics.count_reload(valid=True)
    assert REGISTRY.get_sample_value("rheostat_policy_file_valid", {"model_name": ""}) == 1
    metrics.count_reload(valid=False)
    assert REGISTRY.get_sample_value("rheostat_policy_file_valid", {"model_name": ""}) == 0
    after = value("policy_reloads", result="ok"), value("policy_reloads", result="bad")
    assert after == (before[0] + 1, before[1] + 1)


def test_rejections_are_counted_by_code() -> None:
    before = value("rejected_requests", code="metrics-code")
    metrics.count_rejection("metrics-code")
    assert value("rejected_requests", code="metrics-code") == before + 1


def test_every_series_is_named_after_the_model_and_some_are_there_at_once() -> None:
    program = """
from prometheus_client import REGISTRY
from server.telemetry import metrics

metrics.name_model("demo")
metrics.show_build({"version": "1", "vllm": "2", "weights": ""})
ours = [f for f in REGISTRY.collect() if f.name.startswith("rheostat_")]
labels = [s.labels for f in ours for s in f.samples]
assert {each["model_name"] for each in labels} == {"demo"}
print(*sorted(f.name for f in ours if f.samples))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == [
        "rheostat_build_info",
        "rheostat_decision_latency_seconds",
        "rheostat_policy_reloads",
        "rheostat_rejected_requests",
        "rheostat_requests_in_flight",
        "rheostat_scored_prompts",
        "rheostat_trace_lost",
    ], done.stderr
