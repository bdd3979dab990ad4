from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.context import Decision
from server.telemetry.spans import RequestSpans, trace_headers
from server.web.middleware import COUNTED
from tests.server.collector import Collector, collecting
from tests.server.manifests import MANIFEST
from tests.server.middlewares import CHAT, USER, FakeServer, send_to

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
EXPORTER = InMemorySpanExporter()


@pytest.fixture(scope="module", autouse=True)
def collector() -> Iterator[Collector]:
    """Sets up what --otlp-traces-endpoint does, beside an exporter that keeps spans."""
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(EXPORTER))
    trace.set_tracer_provider(made)
    with collecting() as running:
        exporter = OTLPSpanExporter(endpoint=running.endpoint)
        made.add_span_processor(SimpleSpanProcessor(exporter))
        yield running
        made.shutdown()


@pytest.fixture(autouse=True)
def no_spans() -> None:
    EXPORTER.clear()


class Tracing(FakeServer):
    """Notes what would go to the engine."""

    async def __call__(self, scope: object, receive: object, send: object) -> None:
        self.told = trace_headers()
        await super().__call__(scope, receive, send)  # type: ignore[arg-type]


def one_span(server: FakeServer, path: str, body: object, **headers: str) -> ReadableSpan:
    observed = [RequestSpans(MANIFEST.names, "demo", COUNTED)]
    send_to(server, path, body, headers=list(headers.items()), observers=observed)
    (span,) = EXPORTER.get_finished_spans()
    return span


def test_span_says_what_was_asked_and_what_was_decided() -> None:
    decisions = {(0, 0): Decision(0, margins=(1.5, -2.0)), (0, 1): Decision(None)}
    body = {"model": "demo", "messages": [USER], "max_tokens": 7, "n": 2, "temperature": 0.5}
    body["refusal"] = {"decision": "sample"}
    span = one_span(Tracing(decisions), CHAT, body)
    assert (span.name, span.kind) == ("chat demo", trace.SpanKind.SERVER)
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "rheostat",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.temperature": 0.5,
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "rheostat.policy": "default",
        "rheostat.rule": "sample",
        "rheostat.decision": ("refuse", "respond"),
        "rheostat.category": (MANIFEST.names[0], ""),
        "rheostat.clamped": (),
        f"rheostat.margin.{MANIFEST.names[0]}": 1.5,
        f"rheostat.margin.{MANIFEST.names[1]}": -2.0,
    }


def test_span_stands_between_the_callers_and_the_engines() -> None:
    server = Tracing()
    span = one_span(server, CHAT, {"messages": [USER]}, traceparent=PARENT)
    context = span.get_span_context()
    assert context is not None
    assert span.parent is not None
    assert (f"{context.trace_id:x}", f"{span.parent.span_id:x}") == (
        "af7651916cd43dd8448eb211c80319c",
        "b7ad6b7169203331",
    )
    assert server.told["traceparent"] == (f"00-{context.trace_id:032x}-{context.span_id:016x}-01")


def test_rejected_request_has_its_error_and_no_word_of_its_text() -> None:
    body = {"messages": [USER], "refusal": {"a secret": 1}, "max_tokens": "a secret"}
    span = one_span(FakeServer(), CHAT, body)
    attributes = dict(span.attributes or {})
    assert (attributes["http.response.status_code"], attributes["error.type"]) == (
        422,
        "invalid_request",
    )
    assert span.status.status_code is trace.StatusCode.UNSET
    assert "secret" not in span.to_json()


def test_fault_of_the_server_is_an_error() -> None:
    span = one_span(FakeServer(status=503), CHAT, {"messages": [USER]})
    assert span.status.status_code is trace.StatusCode.ERROR


def test_routes_that_generate_nothing_have_no_span() -> None:
    observed = [RequestSpans(MANIFEST.names, "demo", COUNTED)]
    send_to(FakeServer(), "/v1/models", b"", method="GET", observers=observed)
    assert EXPORTER.get_finished_spans() == ()


def test_span_reaches_a_collector_as_it_was_made(collector: Collector) -> None:
    collector.spans.clear()
    decisions = {(0, 0): Decision(0, margins=(1.5, -2.0))}
    one_span(FakeServer(decisions), CHAT, {"messages": [USER]}, traceparent=PARENT)
    (span,) = collector.spans
    assert (span.name, span.trace_id, span.parent_id) == ("chat demo", *PARENT.split("-")[1:3])
    assert span.attributes["rheostat.decision"] == ["refuse"]
    assert span.attributes[f"rheostat.margin.{MANIFEST.names[0]}"] == 1.5
