"""Our Prometheus metrics, on ``/metrics`` beside vLLM's own."""

from functools import lru_cache

from prometheus_client import Counter, Gauge, Histogram

from models.controls import Rule

# Values of the label ``policy`` come from the policy file only, never from a request.
REQUESTS = Counter(
    "rheostat_requests",
    "Requests to routes that generate or score, and requests rejected on any route, by route and "
    "HTTP status.",
    ["route", "status"],
)
DECISIONS = Counter(
    "rheostat_decisions",
    "Choices by decision (refuse, respond, or would_refuse under a policy that is not enforced), "
    "category, decision rule and policy.",
    ["decision", "category", "rule", "policy"],
)
SCORED = Counter("rheostat_scored_prompts", "Prompts decided by /v1/refusal/score, without text.")
# A prompt's true category is unknown, so a rate (the refused share of a category's own prompts)
# cannot be observed. Observable is how often the category's token opened a choice, over the choices
# with a rate for it. If the calibration is right,
#   refusals / asked_rate = the share of that traffic which belongs to the category,
# 1 if all of it does, and constant if the traffic's mix is.
RATE_CHOICES = Counter(
    "rheostat_rate_choices",
    "Choices decided with a rate for the category, refused or not: the denominator of both the "
    "refusals and the asked rate.",
    ["policy", "category"],
)
RATE_REFUSALS = Counter(
    "rheostat_rate_refusals",
    "Of rheostat_rate_choices, those refused with the category's own token.",
    ["policy", "category"],
)
ASKED_RATE = Counter(
    "rheostat_asked_rate",
    "Sum of the rates asked for the category over rheostat_rate_choices: the refusals to expect if "
    "every prompt belonged to the category. Refusals divided by it are the category's share of "
    "the traffic; when that moves without the traffic, the calibration no longer fits.",
    ["policy", "category"],
)
DECISION_LATENCY = Histogram(
    "rheostat_decision_latency_seconds",
    "Time from the engine's call to the control token.",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
CLAMPED = Counter(
    "rheostat_clamped_dials",
    "Choices decided with a category's dial at a bound, because the request set it beyond.",
    ["policy", "category", "bound"],
)
POLICY_RELOADS = Counter(
    "rheostat_policy_reloads",
    "Reloads of the policy file: ok, or bad (the old policies stay in force).",
    ["result"],
)
POLICY_FILE_VALID = Gauge(
    "rheostat_policy_file_valid",
    "1 if the policy file is in force as last read; 0 if it was bad, or there is none.",
)
TRACE_LOST = Counter(
    "rheostat_trace_lost", "Lines of the decision trace that could not be written."
)


@lru_cache(4096)
def _child(counter: Counter, *labels: str) -> Counter:
    return counter.labels(*labels)


def count_request(route: str, status: int) -> None:
    """Counts one answered request."""
    _child(REQUESTS, route, str(int(status))).inc()


def count_reload(*, valid: bool) -> None:
    """Counts one reload of the policy file."""
    POLICY_RELOADS.labels("ok" if valid else "bad").inc()
    POLICY_FILE_VALID.set(int(valid))


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
    DECISION_LATENCY.observe(waited_s)
    _child(DECISIONS, decision, category or "", rule.name.lower(), policy).inc()
    for name, bound in clamped:
        _child(CLAMPED, policy, name, bound).inc()
    for name, rate in asked_rates:
        _child(RATE_CHOICES, policy, name).inc()
        _child(ASKED_RATE, policy, name).inc(rate)
        if name == category:
            _child(RATE_REFUSALS, policy, name).inc()
