"""Which requests have the text of a refusal in `content` too, and who says so."""

from pathlib import Path
from typing import Any

import pytest

from models.errors import RequestError
from server.apis.turns import MESSAGES, RESPONSES
from server.context import Decision
from server.dials.protocol import RefusalOptions, parse_options
from server.policies.source import FileError
from server.settings import Settings
from server.web.score import parse_score
from tests.server.middlewares import (
    CHAT,
    COMPLETIONS,
    USER,
    FakeServer,
    assert_refused,
    send_to,
)
from tests.server.policybooks import book

REFUSED = {(0, 0): Decision(0)}
BOTH = {"refusal_in": ["refusal", "content"]}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    f"{CHAT}/batch": {"messages": [[USER], [USER]]},
    "/invocations": {"messages": [USER]},
    COMPLETIONS: {"prompt": "Hello"},
    RESPONSES: {"input": "Hello"},
    MESSAGES: {"messages": [USER], "max_tokens": 8},
}
CHATS = (CHAT, f"{CHAT}/batch", "/invocations")


def in_content(path: str, refusal: Any = None, defaults: RefusalOptions | None = None) -> bool:
    server = FakeServer(REFUSED)
    settings = Settings(defaults=defaults or RefusalOptions())
    body = {**BODIES[path], **({"refusal": refusal} if refusal else {})}
    assert send_to(server, path, body, settings=settings).status_code == 200
    assert server.context is not None
    return server.context.in_content


@pytest.mark.parametrize("path", CHATS)
def test_every_chat_route_takes_it(path: str) -> None:
    assert in_content(path, BOTH)
    assert not in_content(path, {"refusal_in": ["refusal"]})
    assert not in_content(path)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, body) for path, body in BODIES.items() if path not in CHATS),
        ("/invocations", {"prompt": "Hello"}),
    ],
)
def test_routes_without_chat_messages_refuse_it(path: str, body: dict[str, Any]) -> None:
    server = FakeServer(REFUSED)
    answer = send_to(server, path, {**body, "refusal": BOTH})
    if path == MESSAGES:
        assert (answer.status_code, server.calls) == (422, 0)
        assert "refusal.refusal_in" in answer.json()["error"]["message"]
    else:
        assert_refused(answer, server, 422, "refusal.refusal_in")


def test_scores_refuse_it() -> None:
    with pytest.raises(RequestError) as caught:
        parse_score({"inputs": [{"prompt": "Hello"}], "refusal": BOTH})
    assert caught.value.param == "refusal.refusal_in"


def test_operators_default_holds_where_the_request_says_nothing() -> None:
    both = parse_options(BOTH)
    assert in_content(CHAT, defaults=both)
    assert not in_content(CHAT, {"refusal_in": ["refusal"]}, both)
    # Where it means nothing, the default does no harm.
    assert in_content(COMPLETIONS, defaults=both)


POLICY = """\
policies:
  p:
    refusal_in: [refusal, content]
anonymous: p
"""


def test_policy_fixes_it_for_its_requests(tmp_path: Path) -> None:
    policy = book(tmp_path, POLICY).policies["p"]
    both = ("refusal", "content")
    assert policy.shows_refusals_in(parse_options({})) == both
    assert policy.shows_refusals_in(parse_options(BOTH)) == both
    assert policy.describe()["refusal_in"] == both
    with pytest.raises(RequestError, match="refusal_in: the policy allows only") as caught:
        policy.shows_refusals_in(parse_options({"refusal_in": ["refusal"]}))
    assert caught.value.status == 403


def test_policys_default_may_be_overridden(tmp_path: Path) -> None:
    text = POLICY.replace("refusal_in: [refusal, content]", f"defaults: {BOTH}")
    policy = book(tmp_path, text).policies["p"]
    assert policy.shows_refusals_in(parse_options({})) == ("refusal", "content")
    assert policy.shows_refusals_in(parse_options({"refusal_in": ["refusal"]})) == ("refusal",)


def test_policy_that_contradicts_its_own_default_is_an_error(tmp_path: Path) -> None:
    text = POLICY.replace("anonymous", "    defaults: {refusal_in: [refusal]}\nanonymous")
    with pytest.raises(FileError, match=r"defaults\.refusal_in: differs"):
        book(tmp_path, text)
