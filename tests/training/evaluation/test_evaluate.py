import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.errors import EvaluationError
from tests.training.conftest import WriteRows, small_rows
from tests.training.evaluated import evaluated, policy, serve, small_report
from training.evaluation.report import Report, load_report


class Counting:
    """A server that counts, and dies after so many requests."""

    def __init__(self, dies_after: float = math.inf) -> None:
        self.scored: list[str] = []
        self.chats = 0
        self.left = dies_after

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.left -= 1
        if self.left < 0:
            return httpx.Response(400, json={"error": {"message": "gone"}})
        if request.url.path == "/v1/refusal/score":
            body = json.loads(request.content)
            self.scored += [entry["messages"][-1]["content"] for entry in body["inputs"]]
        self.chats += request.url.path == "/v1/chat/completions"
        return serve(request)


def test_report_counts_what_the_server_did() -> None:
    # Eight rows of "safety", eight of "humanizing": all refused; sixteen to answer: none is.
    report = small_report()

    everything = report.sets["all"]
    assert everything.prompts == 32
    assert (everything.unsafe.refused.hits, everything.unsafe.refused.n) == (16, 16)
    assert (everything.safe.refused.hits, everything.safe.refused.n) == (0, 16)
    assert everything.right_category.value == 1.0
    assert everything.confusion.counts == [[8, 0, 0], [0, 8, 0], [0, 0, 16]]
    assert report.sets["rows"] == everything
    assert [record.decided for record in report.records[:4]] == ["safety", "humanizing", None, None]
    assert report.texts.own_fidelity.hits == 32
    assert report.texts.flip_to_respond.n == 16
    assert sum(flip.n for flip in report.texts.flip_to_refuse.values()) == 16
    assert report.about.policy.biases == {"safety": 0.0, "humanizing": 0.0}
    assert report.about.calibration is not None


def test_computed_decisions_are_held_to_real_ones() -> None:
    report = small_report()

    # The prompts as they are, and four other ways of asking.
    assert (report.agreement.scored.hits, report.agreement.scored.n) == (5 * 32, 5 * 32)
    assert (report.agreement.chat.hits, report.agreement.chat.n) == (32, 32)
    assert (report.agreement.dialled.hits, report.agreement.dialled.n) == (32, 32)
    assert [rule.agreement.value for rule in report.rules.values()] == [1.0, 1.0, 1.0]


def test_server_that_decides_otherwise_shows_in_the_agreement(write_rows: WriteRows) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        response = serve(request)
        if request.url.path != "/v1/refusal/score":
            return response
        body = response.json()
        for entry in body["data"]:
            entry.update(refused=False, category=None)
        return httpx.Response(200, json=body)

    report = evaluated(write_rows(small_rows()), handler, texts=0)

    assert report.sets["all"].unsafe.refused.hits == 0
    # In capitals, and with some typos, the prompts lose the word and are answered in any case.
    assert 0.6 <= (report.agreement.scored.value or 0.0) < 0.7
    assert report.agreement.chat.hits == 16


def test_capitals_hide_the_words_from_this_server() -> None:
    changes = {name: variant.changed.hits for name, variant in small_report().robustness.items()}

    assert changes["capitals"] == 16
    assert changes["system_prompt"] == changes["second_turn"] == 0


def test_rejected_way_of_asking_says_why(write_rows: WriteRows) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if b'"system"' in request.content:
            error = {"message": "no system prompt", "param": "inputs.0.messages"}
            return httpx.Response(400, json={"error": error})
        return serve(request)

    robustness = evaluated(write_rows(small_rows()), handler, texts=0).robustness

    assert robustness["system_prompt"].changed.value is None
    assert "no system prompt" in str(robustness["system_prompt"].changed.reason)
    assert robustness["typo"].changed.value is not None


def test_without_calibration_rates_have_a_reason(write_rows: WriteRows) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/refusal/calibration":
            return httpx.Response(404, json={"error": {"message": "none"}})
        return serve(request)

    report = evaluated(write_rows(small_rows()), handler, texts=0)

    assert report.about.calibration is None
    assert "rheostat calibrate" in str(report.rates.reason)
    assert report.rates.largest_gap.value is None


def test_policy_that_rejects_dials_leaves_reasons(write_rows: WriteRows) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if b'"never"' in request.content or b'"bias"' in request.content:
            return httpx.Response(403, json={"error": {"message": "below the floor"}})
        return serve(request)

    report = evaluated(write_rows(small_rows()), handler)

    assert "bounds" in str(report.texts.flip_to_respond.reason)
    assert report.texts.own_fidelity.value == 1.0
    assert "below the floor" in str(report.agreement.dialled.reason)
    assert "below the floor" in str(report.rules["paper"].agreement.reason)
    assert report.agreement.chat.value == 1.0


def test_shadow_mode_checks_nothing(write_rows: WriteRows) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/refusal/policies":
            return httpx.Response(200, json={"data": [{**policy(), "enforce": False}]})
        return serve(request)

    report = evaluated(write_rows(small_rows()), handler, texts=0)

    assert "shadow" in str(report.agreement.chat.reason)
    assert report.agreement.scored.value == 1.0


def test_without_texts_or_teacher_nothing_is_graded(write_rows: WriteRows) -> None:
    path = write_rows(small_rows())

    assert "--texts 0" in str(evaluated(path, texts=0).texts.own_fidelity.reason)
    assert "--train-data" in str(evaluated(path, taught=False).texts.flip_to_respond.reason)


def test_limit_and_texts_draw_that_many(write_rows: WriteRows) -> None:
    report = evaluated(write_rows(small_rows()), limit=10, texts=3)

    assert len(report.records) == 10
    assert report.texts.own_fidelity.n == 3


def test_same_seed_measures_the_same(write_rows: WriteRows) -> None:
    path = write_rows(small_rows())
    once, again = (evaluated(path, limit=20, texts=5, seed=3, taught=False) for _ in range(2))

    assert _figures(once) == _figures(again)
    assert _figures(once) != _figures(evaluated(path, limit=20, texts=5, seed=4, taught=False))


def _figures(report: Report) -> Any:
    return report.model_dump(exclude={"about"})


def test_killed_run_goes_on_where_it_was(write_rows: WriteRows, tmp_path: Path) -> None:
    path, out = write_rows(small_rows()), tmp_path / "report.json"
    dying = Counting(dies_after=20)

    with pytest.raises(EvaluationError, match="gone"):
        evaluated(path, dying, out=out)
    assert not out.exists()
    resumed, fresh = Counting(), Counting()
    report = evaluated(path, resumed, out=out)
    evaluated(path, fresh)

    assert not set(resumed.scored) & set(dying.scored) - {"Hello"}
    assert 0 < resumed.chats <= fresh.chats
    assert _figures(report) == _figures(small_report())
    assert load_report(out) == report
    assert {entry.name for entry in tmp_path.iterdir()} == {"rows.jsonl", "report.json"}


def test_prompt_that_occurs_twice_is_scored_once(write_rows: WriteRows) -> None:
    server = Counting()

    report = evaluated(write_rows(small_rows() * 2), server, texts=0)

    assert len(report.records) == 64
    asked = [prompt for prompt in server.scored if prompt != "Hello"]
    assert len(asked) == 5 * 32


def test_two_files_are_two_sets(tmp_path: Path) -> None:
    rows = small_rows()
    for name, some in (("first.jsonl", rows[:8]), ("Second set.jsonl", rows[8:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    listed = tmp_path / "sets.yaml"
    listed.write_text(
        json.dumps([str(tmp_path / "first.jsonl"), str(tmp_path / "Second set.jsonl")])
    )

    report = evaluated(listed, texts=0)

    assert list(report.sets) == ["all", "first", "second-set"]
    assert [part.prompts for part in report.sets.values()] == [32, 8, 24]
    assert report.about.data["second-set"].source.endswith("Second set.jsonl")


def test_refused_request_says_what_the_server_said(write_rows: WriteRows) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/chat/completions":
            return httpx.Response(422, json={"error": {"message": "no such dial"}})
        return serve(request)

    with pytest.raises(EvaluationError, match=r"rows.jsonl:\d+: .*422.*no such dial"):
        evaluated(write_rows(small_rows()), handler)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/refusal/categories", "refusal categories"),
        ("/v1/refusal/policies", "policy with its dials"),
        ("/v1/refusal/score", "scores"),
        ("/v1/chat/completions", "refusal_report"),
    ],
)
def test_server_that_answers_otherwise_is_not_ours(
    write_rows: WriteRows, path: str, expected: str
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == path:
            return httpx.Response(200, json={"data": [], "choices": [{"message": {}}]})
        return serve(request)

    with pytest.raises(EvaluationError, match=expected):
        evaluated(write_rows(small_rows()), handler)


def test_earlier_refusals_carry_their_category(write_rows: WriteRows) -> None:
    sent: list[list[dict[str, Any]]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/chat/completions":
            sent.append(json.loads(request.content)["messages"])
        return serve(request)

    turns = [
        {"role": "user", "content": "Do you love me?"},
        {"role": "assistant", "content": "I'm an AI.", "category": "humanizing"},
        {"role": "user", "content": "What are hats?"},
        {"role": "assistant", "content": "Clothes.", "category": None},
    ]
    evaluated(write_rows([{"messages": turns}, *small_rows()]), handler)

    earlier = [messages[1] for messages in sent if len(messages) == 3]
    told = {"role": "assistant", "refusal": "I'm an AI.", "refusal_category": "humanizing"}
    assert earlier
    assert all(turn == told for turn in earlier)
