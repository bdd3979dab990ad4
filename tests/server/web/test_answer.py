import json
from typing import Any

from server.web.answer import shape_events


def doubled(event: dict[str, Any]) -> list[dict[str, Any]]:
    return [event, {"type": "more", "of": event["type"]}]


def test_named_event_stays_named_by_its_own_type() -> None:
    shaped = shape_events(b'event: a\ndata: {"type": "a"}', doubled)
    assert shaped == (
        b'event: a\ndata: {"type":"a"}\n\nevent: more\ndata: {"type":"more","of":"a"}'
    )


def test_unnamed_event_gets_no_name() -> None:
    shaped = shape_events(b'data: {"type": "a"}', doubled)
    assert shaped == b'data: {"type":"a"}\n\ndata: {"type":"more","of":"a"}'


def test_event_that_nothing_stands_for_leaves_no_gap() -> None:
    def kept(event: dict[str, Any]) -> list[dict[str, Any]]:
        return [event] if event["type"] == "b" else []

    events = b"\n\n".join(b'data: {"type":"%c"}' % letter for letter in b"abab")
    assert shape_events(events, kept) == b'data: {"type":"b"}\n\ndata: {"type":"b"}'
    assert shape_events(b'data: {"type":"a"}', kept) == b""


def test_end_mark_and_comments_pass() -> None:
    for event in (b"data: [DONE]", b": keep-alive", b"event: ping", b"retry: 3"):
        assert shape_events(event, doubled) == event


def test_text_that_looks_like_an_event_is_text() -> None:
    text = "data: {\n\nevent: x"
    event = b"event: a\ndata: " + json.dumps({"type": "a", "text": text}).encode()
    shaped = shape_events(event, lambda one: [one])
    assert json.loads(shaped.split(b"data: ", 1)[1])["text"] == text
