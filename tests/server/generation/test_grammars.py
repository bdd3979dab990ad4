"""What a grammar may be; tests/e2e/test_isolation.py has what it may cost."""

from types import SimpleNamespace
from typing import Any

import pytest

from models.errors import NotAllowedError, RequestError
from server.generation.grammars import check_grammar


def asked(**changed: Any) -> Any:
    """Returns what stands for vLLM's ``StructuredOutputsParams``."""
    kinds = ("json", "regex", "choice", "grammar", "structural_tag")
    return SimpleNamespace(**{**dict.fromkeys(kinds), "json_object": None, **changed})


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
    check_grammar(asked(**grammar), allowed=True, most_bytes=size)
    if size:
        with pytest.raises(RequestError, match=f"{size} bytes, .*RHEOSTAT_MAX_GRAMMAR_BYTES") as e:
            check_grammar(asked(**grammar), allowed=True, most_bytes=size - 1)
        assert (e.value.status, e.value.param) == (400, "structured_outputs")
    if size:
        with pytest.raises(NotAllowedError, match="policy allows no grammars"):
            check_grammar(asked(**grammar), allowed=False, most_bytes=size)
    else:  # it holds no text of the client's
        check_grammar(asked(**grammar), allowed=False, most_bytes=size)
