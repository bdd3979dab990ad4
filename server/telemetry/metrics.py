"""Our Prometheus metrics, beside vLLM's own on both listeners.

Every series has the label ``model_name``, as vLLM's have. All labels are bounded: routes are those
of the table, policies those of the policy file, codes those of our errors; no label's value comes
from a request.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, TypeVar

from prometheus_client import Counter, Gauge, Histogram

from models.controls import Rule

MODEL = "model_name"
BUILD_LABELS = ("version", "vllm", "weights")
# Codes of what is rejected because too much is under way.
FULL = ("queue_full", "tenant_full")
Metric = TypeVar("Metric", Counter, Gauge, Histogram)


def _counter(name: str, help_text: str, *labels: str) -> Counter:
    return Counter(name, help_text, [MODEL, *labels])


def _gauge(name: str, help_text: str, *labels: str, sums: bool = False) -> Gauge:
    # Of several processes each has a part, or the last to write has the newest state.
    mode: Literal["livesum", "mostrecent"] = "livesum" if sums else "mostrecent"
    return Gauge(name, help_text, [MODEL, *labels], multiprocess_mode=mode)


REQUESTS = _counter(
    "rheostat_requests",
    "Requests to routes that generate or score, and requests rejected on any route, by route and "
    "HTTP status.",
    "route",
    "status",
)
REJECTED = _counter(
    "rheostat_rejected_requests",
    "Requests that the server rejected before the engine saw them, by the error's code: mistakes, "
    "unknown callers, a full queue, a server that drains.",
    "code",
)
IN_FLIGHT = _gauge(
    "rheostat_requests_in_flight",
    "Requests to routes that generate or score whose answer is not complete.",
    sums=True,
)
UNDER_WAY = _gauge(
    "rheostat_answers_under_way", "Answers that the engine works on or that wait for it.", sums=True
)
WAITING = _gauge(
    "rheostat_answers_waiting",
    "Of the answers under way, those beyond what the engine works on at once.",
)
MOST = _gauge(
    "rheostat_answers_limit",
    "So many answers may be under way; a request beyond gets 429 (RHEOSTAT_MAX_WAITING).",
)
DRAINING = _gauge("rheostat_draining", "1 once the server ends and takes no more requests, else 0.")
DECISIONS = _counter(
    "rheostat_decisions",
    "Choices by decision (refuse, respond, or would_refuse under a policy that is not enforced), "
    "category, decision rule and policy.",
    "decision",
    "category",
    "rule",
    "policy",
)
SCORED = _counter("rheostat_scored_prompts", "Prompts decided by /v1/refusal/score, without text.")
# A prompt's true category is unknown, so a rate (the refused share of a category's own prompts)
# cannot be observed. Observable is how often the category's token opened a choice, over the choices
# with a rate for it. If the calibration is right,
#   refusals / asked_rate = the share of that traffic which belongs to the category,
# 1 if all of it does, and constant if the traffic's mix is.
RATE_CHOICES = _counter(
    "rheostat_rate_choices",
    "Choices decided with a rate for the category, refused or not: the denominator of both the "
    "refusals and the asked rate.",
    "policy",
    "category",
)
RATE_REFUSALS = _counter(
    "rheostat_rate_refusals",
    "Of rheostat_rate_choices, those refused with the category's own token.",
    "policy",
    "category",
)
ASKED_RATE = _counter(
    "rheostat_asked_rate",
    "Sum of the rates asked for the category over rheostat_rate_choices: the refusals to expect if "
    "every prompt belonged to the category. Refusals divided by it are the category's share of "
    "the traffic; when that moves without the traffic, the calibration no longer fits.",
    "policy",
    "category",
)
DECISION_LATENCY = Histogram(
    "rheostat_decision_latency_seconds",
    "Time from the engine's call to the control token.",
    [MODEL],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
CLAMPED = _counter(
    "rheostat_clamped_dials",
    "Choices decided with a category's dial at a bound, because the request set it beyond.",
    "policy",
    "category",
    "bound",
)
POLICY_RELOADS = _counter(
    "rheostat_policy_reloads",
    "Reloads of the policy file: ok, or bad (the old policies stay in force).",
    "result",
)
POLICY_FILE_VALID = _gauge(
    "rheostat_policy_file_valid",
    "1 if the policy file is in force as last read; 0 if it was bad, and the old policies stay in "
    "force. Absent without a policy file.",
)
TRACE_LOST = _counter(
    "rheostat_trace_lost", "Lines of the decision trace that could not be written."
)
ENGINE_UP = _gauge("rheostat_engine_up", "1 while the engine can answer, 0 once it has failed.")
BUILD_INFO = _gauge(
    "rheostat_build_info",
    "1; the labels are the versions of Rheostat, vLLM and the manifest's weights (the first 12 "
    "characters of their hash, empty if unknown).",
    *BUILD_LABELS,
)
CALIBRATION_CREATED = _gauge(
    "rheostat_calibration_created_timestamp_seconds",
    "When the calibration was measured; time() minus it is its age.",
    "calibration",
)
CALIBRATION_CHECKED = _gauge(
    "rheostat_calibration_checked_timestamp_seconds",
    "When the recorded margins of the policy's traffic were last tested against the calibration.",
    "calibration",
    "policy",
)
CALIBRATION_ROWS = _gauge(
    "rheostat_calibration_recorded_decisions",
    "Recorded decisions behind the last test.",
    "calibration",
    "policy",
)
CALIBRATION_DISTANCE = _gauge(
    "rheostat_calibration_distance",
    "The drift test's statistic: by how much a share of refusals can be off, 0 to 1.",
    "calibration",
    "policy",
    "category",
)
CALIBRATION_LIMIT = _gauge(
    "rheostat_calibration_distance_limit",
    "The distance above which the calibration no longer fits.",
    "calibration",
    "policy",
    "category",
)
CALIBRATION_ASKED = _gauge(
    "rheostat_calibration_asked_rate",
    "The rate of the policy's default dial: the share of the category's own prompts to refuse. "
    "Absent where the dial is no rate.",
    "calibration",
    "policy",
    "category",
)
CALIBRATION_EXPECTED = _gauge(
    "rheostat_calibration_expected_share",
    "Share of the recorded traffic that the policy's default dial should refuse for the category, "
    "according to the calibration in the traffic's estimated mix.",
    "calibration",
    "policy",
    "category",
)
CALIBRATION_OBSERVED = _gauge(
    "rheostat_calibration_observed_share",
    "Share of the recorded traffic that the policy's default dial refuses for the category.",
    "calibration",
    "policy",
    "category",
)
FIT = (
    CALIBRATION_CHECKED,
    CALIBRATION_ROWS,
    CALIBRATION_DISTANCE,
    CALIBRATION_LIMIT,
    CALIBRATION_ASKED,
    CALIBRATION_EXPECTED,
    CALIBRATION_OBSERVED,
)


class _Served:
    model_name = ""


def name_model(model_name: str) -> None:
    """Sets the label ``model_name`` of every series, before there is any.

    Args:
        model_name: The first served name, as in vLLM's series.
    """
    _Served.model_name = model_name
    _child.cache_clear()
    # There from the start, so that a rate over them is 0 and not absent.
    for metric in (IN_FLIGHT, SCORED, TRACE_LOST, DECISION_LATENCY):
        _child(metric)
    for result in ("ok", "bad"):
        child(POLICY_RELOADS, result)
    for code in FULL:
        child(REJECTED, code)


def child(metric: Metric, *labels: str) -> Metric:
    """Returns a series that stays, from a cache.

    Args:
        metric: One of this module.
        labels: The values of its other labels, in their order.
    """
    found: Metric = _child(metric, *labels)
    return found


def series(metric: Metric, *labels: str) -> Metric:
    """Returns a series of a metric that is cleared; the arguments are those of ``child``."""
    return metric.labels(_Served.model_name, *labels)


@lru_cache(4096)
def _child(metric: Any, *labels: str) -> Any:
    return series(metric, *labels)


def show_build(versions: Mapping[str, str]) -> None:
    """Shows what is running.

    Args:
        versions: By label of ``rheostat_build_info``.
    """
    child(BUILD_INFO, *(versions[label] for label in BUILD_LABELS)).set(1)


def count_request(route: str, status: int) -> None:
    """Counts one answered request."""
    child(REQUESTS, route, str(int(status))).inc()


def count_rejection(code: str) -> None:
    """Counts one request that was rejected before the engine saw it.

    Args:
        code: Of an error of ours.
    """
    child(REJECTED, code).inc()


def count_in_flight(requests: int) -> None:
    """Counts requests as in flight; fewer than 0 are it no more."""
    child(IN_FLIGHT).inc(requests)


def show_answers(under_way: int, waiting: int) -> None:
    """Shows how many answers are under way, and how many of them wait."""
    child(UNDER_WAY).set(under_way)
    child(WAITING).set(waiting)


def count_reload(*, valid: bool) -> None:
    """Counts one reload of the policy file."""
    child(POLICY_RELOADS, "ok" if valid else "bad").inc()
    child(POLICY_FILE_VALID).set(int(valid))


def count_decision(
    category: str | None,
    *,
    rule: Rule,
    asked_rates: tuple[tuple[str, float], ...],
    waited_s: float,
    policy: str,
    clamped: tuple[tuple[str, str], ...] = (),
    enforced: bool = True,
) -> None:
    """Counts one choice's decision.

    Args:
        category: The refused category; None for an answer.
        rule: How it was decided.
        asked_rates: The categories whose dial is a rate, with the rate.
        waited_s: From the engine's call to the control token.
        policy: The name of the request's policy.
        clamped: The categories whose dial was moved to a bound, with the bound.
        enforced: False for a refusal in shadow mode.
    """
    refusal = "refuse" if enforced else "would_refuse"
    decision = "respond" if category is None else refusal
    child(DECISION_LATENCY).observe(waited_s)
    child(DECISIONS, decision, category or "", rule.name.lower(), policy).inc()
    for name, bound in clamped:
        child(CLAMPED, policy, name, bound).inc()
    for name, rate in asked_rates:
        child(RATE_CHOICES, policy, name).inc()
        child(ASKED_RATE, policy, name).inc(rate)
        child(RATE_REFUSALS, policy, name).inc(name == category)
