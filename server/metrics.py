"""Our Prometheus metrics; they stand on ``/metrics`` beside vLLM's own."""

from prometheus_client import Counter, Histogram

from models.controls import Rule

# Requests that follow no policy of their own.
DEFAULT_POLICY = "default"

REQUESTS = Counter(
    "rheostat_requests",
    "Requests to generating routes, by route and HTTP status.",
    ["route", "status"],
)
DECISIONS = Counter(
    "rheostat_decisions",
    "Choices by decision (refuse, respond), category and decision rule.",
    ["decision", "category", "rule"],
)
SCORED = Counter("rheostat_scored_prompts", "Prompts decided by /v1/refusal/score, without text.")
# The truth about a prompt is not known here, so a rate (the share of a category's own prompts that
# is refused) cannot be observed. What can be: how often the category's token opened a choice, over
# the choices for which a rate was asked. With the calibration right,
#   refusals / asked_rate = the share of that traffic which belongs to the category,
# 1 where only its own prompts come in, and constant where the traffic's mix is.
RATE_CHOICES = Counter(
    "rheostat_rate_choices",
    "Choices decided while a rate was asked for the category, whatever they became: the "
    "denominator of both the refusals and the asked rate.",
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


def count_decision(
    category: str | None,
    *,
    rule: Rule,
    asked_rates: tuple[tuple[str, float], ...],
    waited_s: float,
    policy: str = DEFAULT_POLICY,
) -> None:
    """Counts one choice's decision.

    Args:
        category: What it was refused for; None for an answer.
        rule: How it was decided.
        asked_rates: The categories whose dial is a rate, with the rate.
        waited_s: From the engine's call to the control token.
        policy: What the request follows.
    """
    decision = "respond" if category is None else "refuse"
    DECISION_LATENCY.observe(waited_s)
    DECISIONS.labels(decision, category or "", rule.name.lower()).inc()
    for name, rate in asked_rates:
        RATE_CHOICES.labels(policy, name).inc()
        ASKED_RATE.labels(policy, name).inc(rate)
        if name == category:
            RATE_REFUSALS.labels(policy, name).inc()
