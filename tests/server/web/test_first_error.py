from typing import Any

import pytest
from pydantic import (
    BaseModel,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from server.web.first_error import stop_at_first_error


class Part(BaseModel):
    type: str


class Item(BaseModel):
    parts: list[Part | int]


class Request(BaseModel):
    items: list[Item | Part] = []
    names: dict[str, int] = {}


class Looking(BaseModel):
    """Looks into its fields before their types are known, as models of vLLM's do."""

    options: dict[str, int] = {}
    rest: Any = None

    @model_validator(mode="before")
    @classmethod
    def _has_no_zero(cls, data: Any) -> Any:
        if data.get("options", {}).get("zero") == 0:
            raise ValueError("zero is none")
        return data

    @field_validator("rest", mode="before")
    @classmethod
    def _is_known(cls, value: Any, info: ValidationInfo) -> Any:
        return {"a": info.field_name, None: None}[value]


stop_at_first_error(Request, Looking)


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


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [
        ({"options": 5}, ("options",), "Input should be a valid dictionary"),
        ({"options": "x"}, ("options",), "Input should be a valid dictionary"),
        ({"options": {"zero": 0}}, (), "zero is none"),
        ({"rest": "b"}, ("rest",), "a field is not of its type"),
        (5, (), "Input should be a valid dictionary"),
    ],
)
def test_validator_that_trips_over_a_type_is_the_clients_mistake(
    body: Any, path: tuple[str, ...], message: str
) -> None:
    for validate in (Looking.model_validate, TypeAdapter(Looking).validate_python):
        with pytest.raises(ValidationError) as caught:
            validate(body)
        (error,) = caught.value.errors()
        assert error["loc"] == path
        assert message in error["msg"]
    assert Looking.model_validate({"options": {"a": 1}, "rest": "a"}).rest == "rest"
