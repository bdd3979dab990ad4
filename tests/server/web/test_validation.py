import asyncio
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import (
    BaseModel,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from starlette.responses import Response
from typing_extensions import TypedDict

from models.errors import RequestError
from server.web.validation import (
    adapt_bodies,
    answer_failed,
    answer_invalid,
    first_problem,
    stop_at_first_error,
)


class Text(BaseModel):
    type: Literal["text"]
    text: str


class Image(BaseModel):
    type: Literal["image"]
    url: str


class Turn(BaseModel):
    role: str
    content: str | list[Text | Image]


class Body(BaseModel):
    messages: list[Turn]
    temperature: float = 0.0


def problem(value: Any) -> RequestError:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Body).validate_python(value)
    return first_problem(caught.value.errors(), value)


def turn(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("value", "param", "said"),
    [
        ({}, "messages", "Field required"),
        ({"messages": 5}, "messages", "valid list"),
        ({"messages": [], "temperature": "hot"}, "temperature", "valid number"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "Field required"),
        (turn(5), "messages.0.content", "valid string"),
        (turn([{"type": "text", "text": 5}]), "messages.0.content.0.text", "valid string"),
        (turn([{"type": "image", "url": 5}]), "messages.0.content.0.url", "valid string"),
        (5, None, "valid dictionary"),
    ],
)
def test_problem_is_the_one_deepest_in_the_value(value: Any, param: str | None, said: str) -> None:
    error = problem(value)
    assert (error.status, error.param) == (400, param)
    assert said in error.message
    assert error.message.startswith(f"{param}: ") == (param is not None)
    assert "\n" not in error.message


def test_long_names_are_quoted_in_part() -> None:
    errors = [{"loc": ("x" * 500,), "type": "extra_forbidden", "msg": "no"}]
    error = first_problem(errors, {"x" * 500: 1})
    assert error.param == "x" * 77 + "..."


def app() -> FastAPI:
    async def wants_json() -> None:
        raise RequestValidationError(errors=["Unsupported Media Type"])

    served = FastAPI()
    served.add_exception_handler(RequestValidationError, answer_invalid)
    served.add_exception_handler(Exception, answer_failed)

    @served.post("/v1/completions")
    @served.post("/v1/messages")
    async def post(body: Body) -> Response:
        raise AttributeError(f"a secret of {body}")

    @served.get("/item/{number}")
    async def get(number: int, flag: bool = False) -> Response:
        return Response(str((number, flag)))

    @served.post("/other", dependencies=[Depends(wants_json)])
    async def other(body: Annotated[Body, "unused"]) -> Response:
        return Response(str(body))

    return served


def ask(method: str, path: str, body: Any = None) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, json=body)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/v1/completions", turn(5), 400, "messages.0.content"),
        ("POST", "/v1/completions", [], 400, None),
        ("GET", "/item/x", None, 400, "number"),
        ("GET", "/item/1?flag=maybe", None, 400, "flag"),
        ("POST", "/other", {"messages": []}, 415, "Content-Type"),
    ],
)
def test_every_place_of_a_request_is_named_alike(
    method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = ask(method, path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_fault_of_the_server_tells_nothing_of_itself_in_each_apis_shape() -> None:
    answer = ask("POST", "/v1/completions", {"messages": []})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    anthropic = ask("POST", "/v1/messages", {"messages": []}).json()
    assert (anthropic["type"], anthropic["error"]["type"]) == ("error", "api_error")
    assert "secret" not in json.dumps([answer.json(), anthropic])


# models stop at the first wrong entry


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


class Chained(BaseModel):
    """Has validators that change the value one after the other, two of them with an info."""

    steps: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _third(cls, data: Any) -> Any:
        return {"steps": [*data["steps"], "third"]}

    @model_validator(mode="before")
    @classmethod
    def _second(cls, data: Any, info: ValidationInfo) -> Any:
        return {"steps": [*data["steps"], f"second, {info.mode}"]}

    @model_validator(mode="before")
    @classmethod
    def _first(cls, data: Any) -> Any:
        return {"steps": [*data.get("steps", []), "first"]}


class Said(TypedDict):
    content: Iterable[Text]


class Noted(TypedDict):
    note: str


class Batch(BaseModel):
    """Has conversations whose parts pydantic validates only when they are read."""

    messages: list[list[Said | Noted]]


stop_at_first_error(Request, Looking, Chained, Batch)


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


def test_chain_of_validators_runs_in_its_order() -> None:
    for validate in (Chained.model_validate, TypeAdapter(Chained).validate_python):
        assert validate({}).steps == ["first", "second, python", "third"]
        with pytest.raises(ValidationError) as caught:
            validate({"steps": 5})
        assert [error["loc"] for error in caught.value.errors()] == [("steps",)]


def test_parts_of_a_batch_are_validated_once_for_all() -> None:
    part = {"type": "text", "text": "a"}
    batch = Batch.model_validate({"messages": [[{"content": [part]}, {"note": "b"}]]})
    assert batch.messages == [[{"content": [Text(type="text", text="a")]}, {"note": "b"}]]
    wrong = {"messages": [[{"content": [part, {"type": "other", "text": "a"}]}]]}
    with pytest.raises(ValidationError) as caught:
        Batch.model_validate(wrong)
    error = first_problem(caught.value.errors(), wrong)
    assert error.param == "messages.0.0.content.1.type"


class Tripping(BaseModel):
    options: dict[str, int] = {}

    @model_validator(mode="before")
    @classmethod
    def _trips(cls, data: Any) -> Any:
        data["options"].get("a")
        return data


class Holding(BaseModel):
    held: Tripping


def test_bodies_that_hold_such_a_model_are_told_their_field_as_well() -> None:
    app = FastAPI()

    @app.post("/one/derender")
    async def answer(body: Holding) -> None: ...

    adapt_bodies(app, "/derender")

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/one/derender", json={"held": {"options": 5}})

    told = asyncio.run(post())
    assert told.status_code == 422
    assert told.json()["detail"][0]["loc"] == ["body", "held", "options"]
