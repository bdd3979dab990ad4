import json

import pytest

from server.telemetry.denials import MOST_KINDS, OTHER, Denials
from server.web.errors import Failure, failure
from tests.server.manifests import MANIFEST

CHAT = "/v1/chat/completions"
NO_KEY = Failure(401, "no key", None, "invalid_api_key")


def counted(*failures: Failure, tenant: str | None = None) -> list[dict[str, object]]:
    denials = Denials([*MANIFEST.names, "messages"])
    for told in failures:
        denials.add(told, CHAT, tenant, None)
    return [line for denied in denials.take() for line in denied.lines(MANIFEST.names)]


def test_denials_that_are_alike_are_one_line_with_their_number() -> None:
    denials = Denials([])
    for request_id in ("first", "second"):
        denials.add(NO_KEY, CHAT, None, request_id)
    denials.add(failure(403, "no", "refusal.policy", "not_allowed"), CHAT, "acme", None)
    first, second = (line for denied in denials.take() for line in denied.lines([]))
    assert str(first.pop("time")).endswith("+00:00")
    assert first == {
        "request_id": "first",
        "route": CHAT,
        "tenant": None,
        "decision": "denied",
        "status": 401,
        "code": "invalid_api_key",
        "param": None,
        "count": 2,
    }
    assert (second["tenant"], second["param"], second["count"]) == ("acme", "refusal.policy", 1)
    assert denials.take() == []


@pytest.mark.parametrize(
    ("param", "written"),
    [
        ("refusal.categories.safety", "refusal.categories.safety"),
        ("refusal.categories.my secret", "refusal.categories"),
        ("refusal.my secret.report", "refusal"),
        ("my secret", None),
        ("messages.12.content.3.my secret", "messages.12.content.3"),
        ("messages.1234567", "messages"),
        ("X-Refusal", "X-Refusal"),
        (None, None),
    ],
)
def test_path_holds_no_word_of_the_clients(param: str | None, written: str | None) -> None:
    (line,) = counted(failure(422, "the client wrote: my secret", param))
    assert line["param"] == written
    assert "secret" not in json.dumps(line)


@pytest.mark.parametrize("request_id", ["a b", "", "x" * 129, "é", 'a"'])
def test_what_is_no_id_is_left_out(request_id: str) -> None:
    denials = Denials([])
    denials.add(NO_KEY, CHAT, None, request_id)
    (denied,) = denials.take()
    assert denied.request_id is None


def test_no_caller_fills_the_disk_or_crowds_out_anothers_denials() -> None:
    denials = Denials([])
    for number in range(3 * MOST_KINDS):
        denials.add(NO_KEY, f"/{number}", None, None)
    denials.add(NO_KEY, CHAT, "acme", None)
    lines = [line for denied in denials.take() for line in denied.lines([])]
    strangers = [line for line in lines if line["tenant"] is None]
    assert len(strangers) == MOST_KINDS + 1
    assert (strangers[-1]["code"], strangers[-1]["count"]) == (OTHER, 2 * MOST_KINDS)
    assert [line["route"] for line in lines if line["tenant"] == "acme"] == [CHAT]
