import hashlib
from datetime import UTC, date, datetime, timedelta

import pytest
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers

from models.errors import ConfigError
from server.policies.credentials import (
    KeyEntry,
    KeyHash,
    StoredKey,
    check_strength,
    generate_key,
    hash_key,
    presented_keys,
)

KEY_ENTRY: TypeAdapter[StoredKey] = TypeAdapter(KeyEntry)


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


HASH = hash_key("key")
NOON = datetime(2027, 1, 31, 12, tzinfo=UTC)
NOON_AND_A_HALF = datetime(2027, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "expires"),
    [
        (HASH, None),
        ({"hash": HASH}, None),
        ({"hash": HASH, "expires": date(2027, 1, 31)}, datetime(2027, 1, 31, tzinfo=UTC)),
        ({"hash": HASH, "expires": NOON}, NOON),
        # As texts, which a library may have made of them.
        ({"hash": HASH, "expires": "2027-01-31"}, datetime(2027, 1, 31, tzinfo=UTC)),
        ({"hash": HASH, "expires": NOON.isoformat()}, NOON),
        ({"hash": HASH, "expires": "2027-01-31T12:00:00.5Z"}, NOON_AND_A_HALF),
    ],
)
def test_key_is_written_with_or_without_its_end(written: object, expires: datetime | None) -> None:
    assert KEY_ENTRY.validate_python(written) == StoredKey(hash=HASH, expires=expires)


@pytest.mark.parametrize(
    "expires", ["soon", 5, datetime(2027, 1, 31), "2027-01-31T12:00", "soon: 5"]
)
def test_end_of_a_key_that_means_no_instant_is_refused(expires: object) -> None:
    with pytest.raises(ValidationError, match="a time with its zone"):
        KEY_ENTRY.validate_python({"hash": HASH, "expires": expires})


@pytest.mark.parametrize(("written", "said"), [(5, "write the hash"), ({"hash": 5}, "string")])
def test_what_is_no_key_is_refused(written: object, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        KEY_ENTRY.validate_python(written)


def test_key_is_good_until_the_instant_at_which_it_expires() -> None:
    key = StoredKey(hash=HASH, expires=NOON)
    assert not key.expired(NOON - timedelta(microseconds=1))
    assert key.expired(NOON)
    assert not StoredKey(hash=HASH).expired(datetime.max.replace(tzinfo=UTC))
