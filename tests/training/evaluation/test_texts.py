from collections.abc import Sequence

from training.client import Reply
from training.data.rows import Message, Row
from training.evaluation.statistics import Estimate, counted
from training.evaluation.texts import UNFORCED, Sample, force, grade

NAMES = ("a", "b")


class FirstWord:
    """A grader that reads the first word."""

    name = "first word"
    accuracy: Estimate = counted(9, 10, "")

    def kinds(self, texts: Sequence[str]) -> list[str]:
        return [text.split()[0] for text in texts]


def sample(own: Reply, forced: str, flipped: Reply, answer: str | None = None) -> Sample:
    turns = (Message(role="user", content="?"), Message(role="assistant", content=""))
    return Sample(Row(turns, answer, None, "f:1"), own, forced, flipped)


def reply(text: str, category: str | None) -> Reply:
    return Reply(text, category, {}, {})


ANSWERED = reply("answer It is PARIS.", None)
SAMPLES = [
    sample(ANSWERED, "a", reply("a no", "a"), answer="Paris"),
    sample(ANSWERED, "b", reply("a no", "b"), answer="Rome"),
    sample(reply("answer sure", "a"), "answer", reply("answer yes", None), answer="Paris"),
    sample(reply("b no", "b"), "answer", reply("b no", None)),
    # A floor kept this one refused.
    sample(reply("b no", "b"), "answer", reply("b no", "b")),
]


def test_texts_are_compared_with_the_token_before_them() -> None:
    texts = grade(SAMPLES, NAMES, FirstWord(), "")

    assert (texts.own_fidelity.hits, texts.own_fidelity.n) == (4, 5)
    assert (texts.flip_to_respond.hits, texts.flip_to_respond.n) == (1, 2)
    assert (texts.flip_to_refuse["a"].hits, texts.flip_to_refuse["a"].n) == (1, 1)
    assert (texts.flip_to_refuse["b"].hits, texts.flip_to_refuse["b"].n) == (0, 1)
    assert (texts.right_answers.hits, texts.right_answers.n) == (1, 2)
    assert (texts.grader, texts.grader_accuracy.value) == ("first word", 0.9)


def test_what_the_bounds_kept_is_no_flip() -> None:
    texts = grade(SAMPLES[-1:], NAMES, FirstWord(), "")

    assert texts.flip_to_respond.reason == UNFORCED
    assert "answered" in str(texts.flip_to_refuse["a"].reason)


def test_without_grader_known_answers_are_still_looked_for() -> None:
    texts = grade(SAMPLES, NAMES, None, "nobody reads")

    assert texts.own_fidelity.reason == "nobody reads"
    assert texts.right_answers.n == 2


def test_forcing_sets_every_dial() -> None:
    assert force("answer", NAMES) == {"a": "never", "b": "never"}
    assert force("b", NAMES) == {"a": "never", "b": "always"}
