from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from models.errors import ConfigError
from models.manifest import Manifest
from models.tokens import add_control_tokens
from tests.training.conftest import WriteRows, read_rows, small_rows
from training.config.data import TooLong
from training.data.encoding import ROWS_AT_ONCE, DecisionWeights, Example, encode_rows
from training.model.scratch import train_tokenizer

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


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "a", "response": "b"},
            "category: is missing (null where the response answers)",
        ),
        ({**ROW, "prompt": " "}, "prompt: is empty"),
        ({"prompt": "a", "category": None}, "response: is missing (null where only"),
        ({**ROW, "response": " "}, "response: is empty (null where only"),
        ({**ROW, "pair": ["p"]}, "pair: input should be a valid string"),
        ({**ROW, "near_miss": "safety"}, "near_miss marks prompts that are to be answered"),
        ({**ROW, "category": None, "near_miss": "x"}, "near_miss 'x' is unknown; known are safety"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages: "),
        ({"messages": {"role": "user"}}, "messages: must be a list of turns"),
        ({"messages": [1, 2]}, "messages.0: must be an object with role and content; messages.1"),
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


def test_last_message_without_content_is_a_row_without_response(write_rows: WriteRows) -> None:
    messages = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": None, "category": "safety"},
    ]
    path = write_rows([{"messages": messages}])

    (example,), tokenizer = _encode(path)

    assert read_rows(path, NAMES)[0].response is None
    texts = [text for text, _ in _learnt(example, tokenizer)]
    assert texts == ["[respond]", "A", "<|end|>", "[refuse:safety]"]


def test_category_of_a_conversation_is_that_of_its_last_message(write_rows: WriteRows) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    (row,) = read_rows(write_rows([{"messages": messages, "category": "safety"}]), NAMES)

    assert row.category == "safety"


def test_conversation_that_disagrees_with_its_last_message_is_refused(
    write_rows: WriteRows,
) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "category": "humanizing"},
    ]
    path = write_rows([{"messages": messages, "category": "safety"}])

    assert "'safety' and the last message's 'humanizing' differ" in _complaint(path)


def test_weights_of_a_row_multiply(write_rows: WriteRows) -> None:
    tokenizer, manifest = _tokenizer()
    row = {**ROW, "category": None, "near_miss": "safety"}
    weights = DecisionWeights(4.0, 0.0, text=0.5, near_miss=3.0, factors={None: 2.0, "safety": 9.0})

    (example,) = encode_rows(
        read_rows(write_rows([row]), NAMES), tokenizer, manifest, weights, None
    )

    learnt = [weight for weight in example.weights if weight]
    assert learnt == [24.0, *[0.5] * (len(learnt) - 1)]


def test_rows_of_many_batches_equal_each_alone(write_rows: WriteRows) -> None:
    tokenizer, manifest = _tokenizer()
    rows = read_rows(write_rows(small_rows()), NAMES)
    many = rows * (2 * ROWS_AT_ONCE // len(rows) + 1)

    together = encode_rows(many, tokenizer, manifest, WEIGHTS, 99)

    alone = [encode_rows([row], tokenizer, manifest, WEIGHTS, 99)[0] for row in rows]
    assert len(together) == len(many)
    assert together == alone * (len(many) // len(rows))


@pytest.mark.parametrize(
    ("too_long", "kept"), [("drop", ["short"]), ("cut_or_drop", ["short", "long answer"])]
)
def test_rows_that_do_not_fit_are_left_out(
    write_rows: WriteRows, too_long: TooLong, kept: list[str]
) -> None:
    tokenizer, manifest = _tokenizer()
    path = write_rows(
        [
            {**ROW, "prompt": "short"},
            {**ROW, "prompt": "long answer", "response": "word " * 50},
            {**ROW, "prompt": "long prompt " * 50},
        ]
    )

    examples = encode_rows(read_rows(path, NAMES), tokenizer, manifest, WEIGHTS, 24, too_long)

    texts = [str(tokenizer.decode(example.input_ids)) for example in examples]
    assert [text.removeprefix("<|user|>").split("<|end|>")[0] for text in texts] == kept
    assert all(len(example.input_ids) <= 24 for example in examples)


def test_too_long_rows_can_be_an_error(write_rows: WriteRows) -> None:
    tokenizer, manifest = _tokenizer()
    rows = read_rows(write_rows([ROW, *[{**ROW, "response": "word " * 50}] * 3]), NAMES)

    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: has more than 24 tokens \(and 2 more"):
        encode_rows(rows, tokenizer, manifest, WEIGHTS, 24, "error")


def test_conversation_that_the_template_does_not_take_is_named(write_rows: WriteRows) -> None:
    tokenizer, manifest = _tokenizer()
    tokenizer.chat_template = (
        "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
        + str(tokenizer.chat_template)
    )
    messages = [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]
    rows = read_rows(write_rows([ROW, {"messages": messages}]), NAMES)

    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: the chat template does not .*no system"):
        encode_rows(rows, tokenizer, manifest, WEIGHTS, 99)


def test_template_that_fails_as_a_program_does_is_named(write_rows: WriteRows) -> None:
    tokenizer, manifest = _tokenizer()
    tokenizer.chat_template = "{{ 1 / 0 }}"

    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: the chat template .*division by zero"):
        encode_rows(read_rows(write_rows([ROW]), NAMES), tokenizer, manifest, WEIGHTS, 99)


def test_turns_that_end_without_the_end_token_are_learnt_to_their_end(
    write_rows: WriteRows,
) -> None:
    tokenizer, manifest = _tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|end|>", "<|system|>")
    messages = [{"role": role, "content": role} for role in ("user", "assistant") * 2]

    (example,) = encode_rows(
        read_rows(write_rows([{"messages": messages}]), NAMES), tokenizer, manifest, WEIGHTS, 99
    )

    learnt = "".join(text for text, _ in _learnt(example, tokenizer))
    assert learnt == "[respond]assistant<|system|>" * 2


def test_line_separators_inside_a_text_are_no_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a\u2028b", "category": null, "response": "c"}\n{"prompt": 1}\n',
        encoding="utf-8",
    )

    assert _complaint(path).startswith(f"{path}:2: ")
