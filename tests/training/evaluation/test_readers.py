"""Who reads the texts of an evaluation: the token, phrases, the wording, a judge over HTTP."""

import json
from pathlib import Path

import pytest

from models.errors import ConfigError, EvaluationError
from tests.training.conftest import WriteRows, small_rows
from tests.training.evaluated import evaluated
from tests.training.judgeserver import Body, Said, judge_server
from training.judging.model import PROMPT, JudgeModel, judge_of
from training.judging.reading import Readers


def lenient(body: Body, number: int) -> Said:
    """Finds that only "I won't" refuses, as a judge that knows one sort of refusal."""
    text = json.loads(body["messages"][1]["content"])["text"]
    return Said(json.dumps({"outcome": "refused" if "won't" in text else "answered"}))


def test_readers_are_compared_on_the_models_own_texts(write_rows: WriteRows) -> None:
    # 8 texts say "I won't", 8 "I'm an AI and cannot", 16 answer.
    with judge_server(lenient) as server:
        judge = JudgeModel(server.url, "lenient", api_key="k")
        report = evaluated(write_rows(small_rows()), readers=Readers(rules=True, judge=judge))

    readers = report.readers
    assert list(readers.by) == ["token", "wording", "rules", "judge"]
    refused = {name: (one.refused.hits, one.refused.n) for name, one in readers.by.items()}
    assert refused == {
        "token": (16, 32),
        "wording": (16, 32),
        "rules": (16, 32),
        "judge": (8, 32),
    }
    pair = readers.pairs["token-judge"]
    assert (pair.agreement.hits, pair.agreement.n) == (24, 32)
    # By chance: 1/2 * 1/4 + 1/2 * 3/4 = 1/2.
    assert pair.kappa.value == pytest.approx(0.5)
    assert readers.pairs["token-rules"].kappa.value == 1.0
    told = readers.by["judge"].judge
    assert told is not None
    assert (told.model, told.url, told.prompt, told.unreadable) == (
        "lenient",
        server.url,
        PROMPT,
        0,
    )
    assert len(told.sha256) == 64


def test_token_is_a_reader_by_itself(write_rows: WriteRows) -> None:
    readers = evaluated(write_rows(small_rows()), taught=False).readers
    assert list(readers.by) == ["token"]
    assert readers.pairs == {}


def test_rules_need_no_training_rows(write_rows: WriteRows) -> None:
    rows = write_rows(small_rows())
    readers = evaluated(rows, taught=False, readers=Readers(rules=True)).readers
    assert (readers.by["rules"].refused.hits, readers.by["rules"].refused.n) == (16, 32)
    assert list(readers.pairs) == ["token-rules"]


def test_without_texts_readers_have_a_reason(write_rows: WriteRows) -> None:
    readers = evaluated(write_rows(small_rows()), texts=0, readers=Readers(rules=True)).readers
    assert readers.by["rules"].refused.reason == "no text was decided"
    assert readers.pairs["token-rules"].kappa.value is None


def test_judge_goes_on_where_a_run_ended(write_rows: WriteRows, tmp_path: Path) -> None:
    def dies(body: Body, number: int) -> Said:
        return Said("gone", 400) if number >= 2 else lenient(body, number)

    rows, out = write_rows(small_rows()), tmp_path / "report.json"
    with judge_server(dies) as server:
        judge = JudgeModel(server.url, "m", at_once=1)
        with pytest.raises(EvaluationError, match="the judge m at"):
            evaluated(rows, out=out, readers=Readers(judge=judge))
        first = len(server.bodies)
        server.says = lenient
        report = evaluated(rows, out=out, readers=Readers(judge=judge))

    assert report.readers.by["judge"].refused.n == 32
    asked = [body["messages"][1]["content"] for body in server.bodies]
    assert not set(asked[:2]) & set(asked[first:])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("http://x/v1", None, None), "needs --judge-model"),
        ((None, "m", None), "need --judge,"),
        ((None, None, Path("p")), "need --judge,"),
    ],
)
def test_options_of_a_judge_belong_together(
    options: tuple[str | None, str | None, Path | None], reason: str
) -> None:
    url, model, prompt = options
    with pytest.raises(ConfigError, match=reason):
        judge_of(url, model, "key", prompt)


def test_key_alone_names_no_judge() -> None:
    assert judge_of(None, None, "key of the environment", None) is None
