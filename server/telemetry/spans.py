"""One OpenTelemetry span a request, between the caller's span and vLLM's.

vLLM sets up the provider and the exporter (``--otlp-traces-endpoint``, ``OTEL_*``). Spans hold no
text of prompts or answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.context import DecisionContext
from server.web.answer import Answer
from server.web.gate import Arrival

Attribute = str | bool | int | float | Sequence[str]

# OpenTelemetry's names: what a request does, and which of its fields are numbers of the model's.
OPERATIONS = {"/v1/completions": "text_completion", "/v1/refusal/score": "score"}
NUMBERS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
}
_PROPAGATOR = TraceContextTextMapPropagator()


class RequestSpans:
    """Makes the spans of one server.

    Args:
        names: The categories in manifest order.
        model_name: The first served name.
        paths: Requests to these get a span.
    """

    def __init__(self, names: Sequence[str], model_name: str, paths: frozenset[str]) -> None:
        self._names = tuple(names)
        self._model_name = model_name
        self._paths = paths
        self._tracer = trace.get_tracer("rheostat")

    @contextmanager
    def __call__(self, arrival: Arrival, answer: Answer) -> Iterator[None]:
        """Holds a request's span open for as long as the block runs."""
        if arrival.path not in self._paths:
            yield
            return
        operation = OPERATIONS.get(arrival.path, "chat")
        name = f"{operation} {self._model_name}"
        parent = _PROPAGATOR.extract(arrival.headers)
        with self._tracer.start_as_current_span(name, parent, SpanKind.SERVER) as span:
            span.set_attributes(
                {
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "rheostat",
                    "http.request.method": arrival.scope["method"],
                    "http.route": arrival.path,
                }
            )
            try:
                yield
            finally:
                self._describe(span, arrival, answer)

    def _describe(self, span: Span, arrival: Arrival, answer: Answer) -> None:
        span.set_attribute("http.response.status_code", answer.status)
        if answer.failure is not None:
            span.set_attribute("error.type", answer.failure.code)
        if answer.status >= 500:
            span.set_status(StatusCode.ERROR)
        if arrival.caller is not None and arrival.caller.tenant is not None:
            span.set_attribute("rheostat.tenant", arrival.caller.tenant)
        span.set_attributes(self._request(arrival.body or {}))
        if arrival.context is not None:
            span.set_attributes(_decided(arrival.context, self._names))

    def _request(self, body: Mapping[str, Any]) -> dict[str, Attribute]:
        numbers = {told: body.get(name) for name, told in NUMBERS.items() if name in body}
        found: dict[str, Attribute] = {
            told: value for told, value in numbers.items() if isinstance(value, int | float)
        }
        # Not the client's word: what it names is one of the served names, or an error.
        return {"gen_ai.request.model": self._model_name, **found}


def trace_headers() -> dict[str, str]:
    """Returns the headers that make what follows a child of the current span."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers)
    return headers


def _decided(context: DecisionContext, names: Sequence[str]) -> dict[str, Attribute]:
    decisions = [decision for _, decision in sorted(context.decisions.items())]
    refusal = "refuse" if context.enforce else "would_refuse"
    indices = [one.category if context.enforce else one.shadow for one in decisions]
    told: dict[str, Attribute] = {
        "rheostat.policy": context.policy,
        "rheostat.rule": context.controls.rule.name.lower(),
        "rheostat.decision": ["respond" if i is None else refusal for i in indices],
        "rheostat.category": ["" if i is None else names[i] for i in indices],
        "rheostat.clamped": [f"{name}:{bound}" for name, bound in context.dials.clamped],
    }
    if context.request_ids:
        told["gen_ai.response.id"] = context.request_ids[0]
    first = next((one.margins for one in decisions if one.margins is not None), ())
    margins = zip(names, first, strict=False)
    return told | {f"rheostat.margin.{name}": margin for name, margin in margins}
