"""Our Prometheus metrics; they stand on ``/metrics`` beside vLLM's own."""

from prometheus_client import Counter, Histogram

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
DECISION_LATENCY = Histogram(
    "rheostat_decision_latency_seconds",
    "Time from the engine's call to the control token.",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
