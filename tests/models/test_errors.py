import inspect
import re

import pytest

from models import errors
from models.errors import RequestError, RheostatError


def classes() -> dict[str, type[Exception]]:
    return {
        name: value
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, Exception) and value.__module__ == "models.errors"
    }


def drawn_tree() -> dict[str, str]:
    """Returns each class of the drawing with the one it hangs under."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([│├└─ ]*)([A-Z]\w+Error)\b", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        path = [*path[:depth], found[2]]
        parents[found[2]] = path[-2] if depth else "Exception"
    return parents


def test_tree_at_the_top_matches_the_classes() -> None:
    assert drawn_tree() == {name: cls.__bases__[0].__name__ for name, cls in classes().items()}


def test_codes_are_distinct_and_each_class_has_its_own() -> None:
    codes = [vars(cls)["code"] for cls in classes().values()]
    assert len(set(codes)) == len(codes) > 5
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


@pytest.mark.parametrize("name", sorted(classes()))
def test_error_keeps_its_message(name: str) -> None:
    error = classes()[name]("what was wrong")
    assert isinstance(error, RheostatError)
    assert (error.message, str(error)) == ("what was wrong", "what was wrong")


def test_request_error_carries_path_and_status() -> None:
    error = RequestError("no", param="refusal.report", status=413)
    assert (error.param, error.status) == ("refusal.report", 413)
    assert (RequestError("no").param, RequestError("no").status) == (None, 422)
