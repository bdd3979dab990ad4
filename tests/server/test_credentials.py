import hashlib

import pytest
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers

from models.errors import ConfigError
from server.credentials import (
    KeyHash,
    check_strength,
    generate_key,
    hash_key,
    is_any,
    owner_of,
    presented_keys,
)

OWNERS = {hash_key("first"): "a", hash_key("second"): "b"}


def headers(*pairs: tuple[str, str]) -> Headers:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
    return Headers(raw=raw)


def test_hash_is_sha256_of_the_keys_bytes() -> None:
    assert hash_key("abc") == "sha256:" + hashlib.sha256(b"abc").hexdigest()
    assert hash_key("é") == hash_key("é".encode())


def test_generated_keys_are_strong_and_differ() -> None:
    keys = {generate_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        check_strength(key)
        assert len(key) == 43  # 32 bytes in base64


@pytest.mark.parametrize(
    "key", ["", "hunter2", "x" * 21, "x" * 30 + " ", "ü" * 30, "x" * 30 + "\n"]
)
def test_weak_or_unsendable_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        check_strength(key)


def test_owner_is_found_wherever_the_hash_stands() -> None:
    assert owner_of(b"first", OWNERS) == "a"
    assert owner_of(b"second", OWNERS) == "b"
    assert owner_of(b"third", OWNERS) is None
    assert owner_of(b"", OWNERS) is None
    assert owner_of(b"first", {}) is None
    assert is_any(b"second", OWNERS)
    assert not is_any(b"third", OWNERS)


def test_hash_itself_is_no_key() -> None:
    assert owner_of(hash_key("first").encode(), OWNERS) is None


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        ([], []),
        ([("authorization", "Bearer k")], [b"k"]),
        ([("authorization", "bearer  k ")], [b"k"]),
        ([("Authorization", "BEARER k")], [b"k"]),
        ([("authorization", "Basic k")], []),
        ([("authorization", "k")], []),
        ([("authorization", "Bearer ")], []),
        ([("authorization", "Bearer")], []),
        ([("x-api-key", "k")], [b"k"]),
        ([("x-api-key", " ")], []),
        ([("x-api-key", "k"), ("authorization", "Bearer l")], [b"k", b"l"]),
        ([("authorization", "Bearer k"), ("authorization", "Bearer l")], [b"k", b"l"]),
        ([("x-api-key", "\xff")], [b"\xff"]),
    ],
)
def test_keys_are_read_off_both_headers(sent: list[tuple[str, str]], keys: list[bytes]) -> None:
    assert presented_keys(headers(*sent)) == keys


@pytest.mark.parametrize(
    "value",
    [
        "sha256:" + "a" * 63,
        "sha256:" + "A" * 64,
        "sha256:" + "g" * 64,
        "md5:" + "a" * 64,
        "a" * 64,
        "",
        " sha256:" + "a" * 64,
        "sha256:" + "a" * 64 + "\n",
    ],
)
def test_what_is_no_hash_is_refused_with_the_command_that_makes_one(value: str) -> None:
    with pytest.raises(ValidationError, match="rheostat policy hash-key"):
        TypeAdapter(KeyHash).validate_python(value)
