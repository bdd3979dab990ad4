from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from server.web.first_error import stop_at_first_error


class Part(BaseModel):
    type: str


class Item(BaseModel):
    parts: list[Part | int]


class Request(BaseModel):
    items: list[Item | Part] = []
    names: dict[str, int] = {}


stop_at_first_error(Request)


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ({"items": [{}] * 1000}, 2),
        ({"items": [{"parts": ["a"] * 1000}] * 1000}, 3),
        ({"names": {str(key): "a" for key in range(1000)}}, 1),
    ],
)
def test_one_entry_of_a_collection_is_told(body: dict[str, Any], errors: int) -> None:
    for validate in (Request.model_validate, TypeAdapter(Request).validate_python):
        with pytest.raises(ValidationError) as caught:
            validate(body)
        assert caught.value.error_count() == errors


def test_what_is_right_is_read_as_before() -> None:
    body = {"items": [{"parts": [{"type": "a"}, 2]}, {"type": "b"}], "names": {"c": 3}}
    assert Request.model_validate(body).model_dump() == body
