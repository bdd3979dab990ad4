from inspect import signature
from typing import Any

import pytest
from starlette.datastructures import Headers
from transformers import PythonBackend

from models.errors import RequestError
from server.web.limits import (
    COPIED,
    COPIED_HEADERS,
    ENGINE_ARGUMENTS,
    LOAD_HEADER,
    REFUSED,
    TEMPLATE_ARGUMENTS,
    refuse_fields,
    refuse_headers,
)


def refused(body: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        refuse_fields(body)
    return caught.value


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("value", [True, 1, "x", "", [], {}, {"prompt_token_ids": [1]}])
def test_field_is_refused_by_name_whatever_it_holds(name: str, value: Any) -> None:
    error = refused({"model": "demo", name: value})
    assert (error.status, error.param) == (400, name)
    assert error.message.startswith(f"{name}: ")


@pytest.mark.parametrize("name", REFUSED)
def test_null_is_no_field(name: str) -> None:
    refuse_fields({name: None})


def test_background_may_be_denied() -> None:
    refuse_fields({"background": False})


@pytest.mark.parametrize("key", sorted(TEMPLATE_ARGUMENTS))
@pytest.mark.parametrize("value", [None, True, "x"])
def test_arguments_of_the_renderer_are_no_variables(key: str, value: Any) -> None:
    error = refused({"chat_template_kwargs": {"enable_thinking": False, key: value}})
    assert (error.status, error.param) == (400, f"chat_template_kwargs.{key}")


def test_every_argument_of_the_renderer_is_known() -> None:
    # `documents` is a variable of templates too, and its text is guarded like any other.
    given = set(signature(PythonBackend.apply_chat_template).parameters)
    assert given - TEMPLATE_ARGUMENTS == {"documents", "kwargs"}


@pytest.mark.parametrize("key", sorted(ENGINE_ARGUMENTS))
def test_arguments_of_the_engine_are_no_extensions(key: str) -> None:
    assert refused({"vllm_xargs": {key: "x"}}).param == f"vllm_xargs.{key}"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"chat_template_kwargs": {"enable_thinking": True, "documents": []}},
        {"vllm_xargs": {"session_id": "a"}},
        {"chat_template_kwargs": None, "vllm_xargs": ["kv_transfer_params"]},
        {"messages": [{"kv_transfer_params": {}}]},
    ],
)
def test_everything_else_is_none_of_its_business(body: dict[str, Any]) -> None:
    refuse_fields(body)


@pytest.mark.parametrize("name", COPIED)
def test_name_that_is_copied_has_a_bounded_length(name: str) -> None:
    refuse_fields({name: "a" * 128})
    refuse_fields({name: None})
    error = refused({name: "a" * 129})
    assert (error.status, error.param) == (400, name)
    assert error.message == f"{name}: it has 129 characters, and at most 128 here"


@pytest.mark.parametrize("name", COPIED_HEADERS)
def test_header_that_is_copied_has_a_bounded_length(name: str) -> None:
    refuse_headers(Headers({name.lower(): "a" * 128}))
    with pytest.raises(RequestError, match="129 characters, and at most 128") as caught:
        refuse_headers(Headers({name.lower(): "a" * 129}))
    assert (caught.value.status, caught.value.param) == (400, name)


def test_header_that_asks_for_the_load_is_refused() -> None:
    with pytest.raises(RequestError, match="the load is that of all callers"):
        refuse_headers(Headers({LOAD_HEADER.decode(): "text"}))


def test_priority_of_more_than_64_bits_is_refused() -> None:
    refuse_headers(Headers({"X-Vllm-Priority": "9" * 18}))
    with pytest.raises(RequestError, match="at most 18 digits") as caught:
        refuse_headers(Headers({"x-vllm-priority": "-" + "9" * 18}))
    assert (caught.value.param, caught.value.status) == ("X-Vllm-Priority", 400)
