from typing import Any

import pytest

from models.errors import RequestError
from server.apis.turns import MESSAGES, READS_CHAT, RESPONSES, open_turns
from tests.server.manifests import MANIFEST

USER = {"role": "user", "content": "Hello"}
ANSWERED = {"role": "assistant", "content": "Hi"}
UNFINISHED = {
    "type": "message",
    "role": "assistant",
    "status": "in_progress",
    "content": [{"type": "output_text", "text": "The"}],
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "messages": [ANSWERED], "input": [ANSWERED]}),
        (RESPONSES, {"input": "x", "messages": [ANSWERED]}),
        (RESPONSES, {"input": [USER]}),
        (MESSAGES, {"messages": [USER], "input": [ANSWERED]}),
        (MESSAGES, {"messages": "x"}),
        *((path, {"messages": [USER], "input": [ANSWERED]}) for path in sorted(READS_CHAT)),
        *((path, {"messages": []}) for path in sorted(READS_CHAT)),
    ],
)
def test_body_without_earlier_turns_is_the_clients_own(path: str, body: dict[str, Any]) -> None:
    turns = open_turns(body, path, MANIFEST)
    assert turns.body is body
    assert sum(turns.counts) == 0
    assert not turns.continues


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (RESPONSES, "input"),
        (MESSAGES, "messages"),
        *((path, "messages") for path in sorted(READS_CHAT)),
    ],
)
def test_earlier_turns_are_opened_where_the_route_reads_them(path: str, name: str) -> None:
    body = {name: [USER, ANSWERED, USER], "temperature": 0}
    turns = open_turns(body, path, MANIFEST)
    assert "[respond]Hi" in str(turns.body[name][1]["content"])
    assert turns.counts == (1,)
    assert body == {name: [USER, ANSWERED, USER], "temperature": 0}, "the client's was changed"


def test_conversations_of_a_batch_are_counted_each() -> None:
    batch = {"messages": [[USER], [USER, ANSWERED, USER], [ANSWERED, ANSWERED]]}
    turns = open_turns(batch, "/v1/chat/completions/batch", MANIFEST)
    assert turns.counts == (0, 1, 2)
    assert [len(conversation) for conversation in turns.body["messages"]] == [1, 3, 2]


def test_only_responses_go_on_with_an_unfinished_message() -> None:
    assert open_turns({"input": [USER, UNFINISHED]}, RESPONSES, MANIFEST).continues
    assert not open_turns({"messages": [USER, UNFINISHED]}, MESSAGES, MANIFEST).continues


def test_unfinished_refusal_is_refused() -> None:
    refused = {**UNFINISHED, "refusal_category": "safety"}
    with pytest.raises(RequestError) as caught:
        open_turns({"input": [USER, refused]}, RESPONSES, MANIFEST)
    assert (caught.value.param, caught.value.status) == ("input", 400)


CONTINUE = {"continue_final_message": True}


@pytest.mark.parametrize(
    ("messages", "continues"),
    [
        ([USER, ANSWERED], True),
        ([ANSWERED, USER], False),
        ([[USER, ANSWERED], [ANSWERED]], True),
        ([[USER], [USER]], False),
        ([[]], False),
        (["no message"], False),
    ],
)
def test_continued_turn_is_an_assistants(messages: list[Any], continues: bool) -> None:
    for path in READS_CHAT:
        turns = open_turns({"messages": messages, **CONTINUE}, path, MANIFEST)
        assert turns.continues is continues


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "refusal": "No"}],
        [USER, {"role": "assistant", "content": "No", "refusal_category": "safety"}],
        [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}],
        [[USER, ANSWERED], [USER]],
    ],
)
def test_continuing_what_has_no_respond_token_is_refused(messages: list[Any]) -> None:
    with pytest.raises(RequestError) as caught:
        open_turns({"messages": messages, **CONTINUE}, "/v1/chat/completions", MANIFEST)
    assert (caught.value.param, caught.value.status) == ("continue_final_message", 400)
