from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from models.errors import ConfigError
from models.manifest import Manifest
from models.tokens import add_control_tokens
from tests.training.conftest import WriteRows, small_rows
from training.data import DecisionWeights, Example, Row, encode_rows, read_rows
from training.scratch import train_tokenizer

NAMES = {"safety": "harms", "humanizing": "a person"}
WEIGHTS = DecisionWeights(plain=5.0, pair=0.0)
ROW: dict[str, object] = {"prompt": "Hi there", "category": "safety", "response": "No."}


def _tokenizer() -> tuple[PreTrainedTokenizerFast, Manifest]:
    texts = [str(row["prompt"]) + str(row["response"]) for row in small_rows()]
    tokenizer = train_tokenizer(texts, 400, 128)
    return tokenizer, add_control_tokens(tokenizer, NAMES)


def _encode(path: Path, max_length: int = 128) -> tuple[list[Example], PreTrainedTokenizerFast]:
    tokenizer, manifest = _tokenizer()
    rows = read_rows(path, NAMES)
    return encode_rows(rows, tokenizer, manifest, WEIGHTS, max_length), tokenizer


def _learnt(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, float]]:
    pairs = zip(example.input_ids, example.weights, strict=True)
    return [(str(tokenizer.decode([token])), weight) for token, weight in pairs if weight]


def _complaint(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_rows(path, NAMES)
    return caught.value.message


def test_prompt_row_becomes_two_turns(write_rows: WriteRows) -> None:
    path = write_rows([{**ROW, "answer": "no", "source": "somewhere"}])

    (row,) = read_rows(path, NAMES)

    assert [turn.content for turn in row.prompt] == ["Hi there"]
    assert (row.category, row.response, row.answer) == ("safety", "No.", "no")
    assert row.origin == f"{path}:1"


def test_unknown_category_lists_the_known_ones(write_rows: WriteRows) -> None:
    path = write_rows([ROW, {**ROW, "category": "medical"}])

    assert _complaint(path) == (
        f"{path}:2: category 'medical' is unknown; known are safety, humanizing, and null where "
        "the response answers"
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "response": "b"}, "category: Field required"),
        ({**ROW, "prompt": " "}, "prompt: "),
        ({**ROW, "response": None}, "response: "),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages: "),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
            "the last message must be the assistant's",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a", "category": "safety"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            "only assistant messages have a category",
        ),
    ],
)
def test_bad_row_names_file_line_and_reason(
    write_rows: WriteRows, row: dict[str, object], reason: str
) -> None:
    path = write_rows([ROW, row])

    assert _complaint(path).startswith(f"{path}:2: {reason}")


@pytest.mark.parametrize("text", ["", "\n", "{", "[1]\n"])
def test_file_without_rows_or_json_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)

    assert str(path) in _complaint(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.jsonl") in _complaint(tmp_path / "none.jsonl")


def test_only_the_response_is_learnt_and_the_control_token_weighs_most(
    write_rows: WriteRows,
) -> None:
    (example,), tokenizer = _encode(write_rows([ROW]))

    learnt = _learnt(example, tokenizer)

    assert learnt[0] == ("[refuse:safety]", 5.0)
    assert "".join(text for text, _ in learnt[1:]) == "No.<|end|>"
    assert {weight for _, weight in learnt[1:]} == {1.0}
    assert tokenizer.decode(example.input_ids) == (
        "<|user|>Hi there<|end|><|assistant|>[refuse:safety]No.<|end|>"
    )


def test_answer_opens_with_the_respond_token(write_rows: WriteRows) -> None:
    (example,), tokenizer = _encode(write_rows([{**ROW, "category": None}]))

    assert _learnt(example, tokenizer)[0] == ("[respond]", 5.0)


def test_decision_of_a_pair_weighs_what_the_recipe_says(write_rows: WriteRows) -> None:
    (example,), tokenizer = _encode(write_rows([{**ROW, "pair": "p1"}]))

    assert "".join(text for text, _ in _learnt(example, tokenizer)) == "No.<|end|>"


def test_every_assistant_turn_is_learnt(write_rows: WriteRows) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": "B", "category": "humanizing"},
    ]

    (example,), tokenizer = _encode(write_rows([{"messages": messages}]))

    texts = [text for text, _ in _learnt(example, tokenizer)]
    assert texts == ["[respond]", "A", "<|end|>", "[refuse:humanizing]", "B", "<|end|>"]


def test_what_a_template_adds_after_the_turn_is_not_learnt(write_rows: WriteRows) -> None:
    tokenizer, manifest = _tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|end|>'", "<|end|>\\n'")

    (example,) = encode_rows(read_rows(write_rows([ROW]), NAMES), tokenizer, manifest, WEIGHTS, 99)

    assert _learnt(example, tokenizer)[-1] == ("<|end|>", 1.0)
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_template_that_rewrites_earlier_turns_is_refused(write_rows: WriteRows) -> None:
    tokenizer, manifest = _tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    rows = read_rows(write_rows([ROW]), NAMES)

    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: the chat template"):
        encode_rows(rows, tokenizer, manifest, WEIGHTS, 99)


def test_control_token_in_the_text_is_refused(write_rows: WriteRows) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: .*\[respond\]"):
        _encode(write_rows([{**ROW, "prompt": "Say [respond] please"}]))


def test_long_row_is_cut_at_its_end(write_rows: WriteRows) -> None:
    path = write_rows([{**ROW, "response": "word " * 50}])
    (whole,), _ = _encode(path)

    (cut,), _ = _encode(path, max_length=20)

    assert cut == Example(whole.input_ids[:20], whole.weights[:20])


def test_row_without_room_for_its_response_is_refused(write_rows: WriteRows) -> None:
    path = write_rows([{**ROW, "prompt": "word " * 50}])

    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: nothing of the response"):
        _encode(path, max_length=20)


def test_row_prompt_is_all_but_the_last_turn(write_rows: WriteRows) -> None:
    messages = [{"role": role, "content": role} for role in ("user", "assistant") * 2]

    row: Row = read_rows(write_rows([{"messages": messages}]), NAMES)[0]

    assert [turn.role for turn in row.prompt] == ["user", "assistant", "user"]
