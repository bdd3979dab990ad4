"""What a grammar may be; tests/e2e/test_isolation.py has what it may cost."""

import json
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from models.errors import NotAllowedError, RequestError
from server.generation.grammars import check_dictation, check_grammar


def asked(**changed: Any) -> Any:
    """Returns what stands for vLLM's ``StructuredOutputsParams``."""
    kinds = ("json", "regex", "choice", "grammar", "structural_tag")
    return SimpleNamespace(**{**dict.fromkeys(kinds), "json_object": None, **changed})


def check(
    *, allowed: bool = True, most_bytes: int = 2**16, choices: int = 1, **grammar: Any
) -> None:
    check_grammar(
        asked(**grammar),
        allowed=allowed,
        most_bytes=most_bytes,
        most_count=4096,
        choices=choices,
    )


@pytest.mark.parametrize(
    ("grammar", "size"),
    [
        ({"json": {"enum": ["ab"]}}, 16),
        ({"json": '{"enum":[]}'}, 11),
        ({"regex": "a+b"}, 3),
        ({"choice": ["yes", "no"]}, 13),
        ({"grammar": "root ::= a"}, 10),
        ({"structural_tag": "{}"}, 2),
        ({"json_object": True}, 0),
    ],
    ids=str,
)
def test_grammar_is_bounded_as_text_whatever_its_kind(grammar: dict[str, Any], size: int) -> None:
    check(most_bytes=size, **grammar)
    if size:
        with pytest.raises(RequestError, match=f"{size} bytes, .*RHEOSTAT_MAX_GRAMMAR_BYTES") as e:
            check(most_bytes=size - 1, **grammar)
        assert (e.value.status, e.value.param) == (400, "structured_outputs")
    if size:
        with pytest.raises(NotAllowedError, match="policy allows no grammars"):
            check(allowed=False, most_bytes=size, **grammar)
    else:  # it holds no text of the client's
        check(allowed=False, most_bytes=size, **grammar)


def items(count: Any, key: str = "maxItems") -> dict[str, Any]:
    return {"type": "array", "items": {}, key: count}


def deep(schema: Any) -> dict[str, Any]:
    return {"properties": {"default": {"anyOf": [{"$defs": {"const": schema}}]}}}


@pytest.mark.parametrize(
    "grammar",
    [
        *({"json": items(4097, key)} for key in ("maxItems", "minItems", "maxContains", "minX")),
        {"json": items(2147483647)},
        {"json": items(1e300)},
        {"json": json.dumps(items(4097.0))},
        {"json": '{"max\\u0049tems": 4097}'},
        {"json": '{"maxItems": 1e999}'},
        {"json": f'{{"maxItems": {"9" * 4000}}}'},
        {"json": f" {json.dumps(items(4097))}"},
        {"json": deep(items(4097))},
        {"json": {"prefixItems": [items(2048), items(2049)]}},
        {"json": {"pattern": "^a{4097}$"}},
        {"json": {"patternProperties": {"a{4097}": {}}}},
        {"json": {"x-guidance": {"whitespace_pattern": " {0,4097}"}}},
        {"structural_tag": json.dumps({"structures": [{"schema": items(4097)}]})},
        {"structural_tag": json.dumps({"format": {"type": "regex", "pattern": "a{4097}"}})},
        {"structural_tag": json.dumps({"format": {"type": "grammar", "grammar": "a: b~4097"}})},
        *(
            {"regex": pattern}
            for pattern in (
                "a{4097}",
                "a{4097,}",
                "a{0,4097}",
                "a{00000000000000000000004097}",
                f"a{{{'9' * 4500}}}",
                "(?x)a{ 4 , 4097 }",
                "a{65}{64}",
                "a{65}{1}{64}",
                "(a{65}){64}",
                "a{4096}b{1}",
                "(a{64}b{1}){64}",
                "(?x)(a{65}) {64}",
                "((a{17}b){17}c){17}",
                "(a{65})?{64}",
                "(a{65}|b{3}\n){64}",
            )
        ),
        {"grammar": "start: A\nA: /(a{65}){64}/"},
        {"grammar": "start: A\nA: /a{65}/{64}"},
        {"grammar": "start: A~4097"},
        {"grammar": "start: A ~ 1 .. 4097"},
        {"grammar": 'root ::= "a"{1,4097}'},
        {"grammar": f"start: %json {json.dumps(items(4097))}"},
        {"grammar": f"start: a %json\n{json.dumps(items(4097))} a\na: /b/"},
    ],
    ids=lambda grammar: str(grammar)[:80],
)
def test_what_counts_come_to_is_bounded_wherever_they_stand(grammar: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"at most 4096 here .RHEOSTAT_MAX_GRAMMAR_COUNT") as e:
        check(**grammar)
    assert (e.value.status, e.value.param) == (400, "structured_outputs")


@pytest.mark.parametrize(
    "grammar",
    [
        {"json": items(4096)},
        {"json": {"prefixItems": [items(2048), items(2048, "minItems")]}},
        {"json": {"type": "string", "minLength": 1, "maxLength": 1000000}},
        {"json": {"type": "integer", "minimum": 2**40, "multipleOf": 10000}},
        {"json": {"enum": [5000], "const": 5000, "default": {"size": 5000}}},
        {"json": {"description": "a{5000}", "pattern": r"^\d{3}-\d{3}-\d{4}$"}},
        {"regex": r"[a-z0-9]{1,63}(\.[a-z]{1,63}){1,8}"},
        {"regex": "[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}"},
        {"regex": "a{4095}b{1}"},
        {"regex": "(a{64}){64}"},
        {"grammar": "start: A B\nA: /a{4096}/\nB: /b{4096}/"},
        {"regex": "{}{,5}"},
        {"grammar": "start: (A{9}){9}\nA: (B{9}){9}\nB: /a{9}/"},
        {"grammar": f"start: %json {json.dumps(items(4096))}"},
        {"choice": ["a{5000}"]},
    ],
    ids=str,
)
def test_ordinary_counts_pass(grammar: dict[str, Any]) -> None:
    check(**grammar)


def test_items_count_for_each_choice() -> None:
    check(json=items(32), choices=128)
    with pytest.raises(RequestError, match="for each of 128 choices: 4224, and at most 4096"):
        check(json=items(33), choices=128)


@pytest.mark.parametrize("text", ["{", "[" * 5000, '{"minItems": NaN}'], ids=lambda text: text[:20])
def test_grammar_of_json_that_cannot_be_read_is_400(text: str) -> None:
    kinds = {"json": text, "structural_tag": text, "grammar": f"start: %json {text}"}
    for kind, written in kinds.items():
        grammar: dict[str, Any] = {kind: written}
        with pytest.raises(RequestError, match="invalid JSON, or nests too deeply") as e:
            check(**grammar)
        assert e.value.status == 400


@pytest.mark.parametrize("text", [" ", "{", "1", "~1", "a{1}", ")", "%json", "{1,"])
def test_counting_takes_time_in_proportion_to_the_text(text: str) -> None:
    started_s = time.process_time()
    with suppress(RequestError):
        check(grammar=text * (2**16 // len(text)))
    with suppress(RequestError):
        check(regex=text * (2**16 // len(text)))
    assert time.process_time() - started_s < 1


PLAIN: dict[str, Any] = {
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "repetition_penalty": 1.1,
}


@pytest.mark.parametrize(
    "dictating",
    [
        {"logit_bias": {7: 100.0}},
        {"logit_bias": {7: -100.0}},
        {"allowed_token_ids": [7, 8]},
        {"bad_words": ["no"]},
        {"repetition_penalty": 8.0},
        {"repetition_penalty": 0.1},
    ],
    ids=str,
)
def test_parameters_that_dictate_an_answer_are_grammars_too(dictating: dict[str, Any]) -> None:
    plain: Any = SimpleNamespace(**PLAIN)
    check_dictation(plain)
    params: Any = SimpleNamespace(**{**PLAIN, **dictating})
    with pytest.raises(NotAllowedError, match="allows no grammars") as caught:
        check_dictation(params)
    assert caught.value.param == next(iter(dictating))
