"""Keys of callers: kept as hashes, compared in constant time, read off HTTP headers."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated, TypeVar

from pydantic import AfterValidator
from starlette.datastructures import Headers

from models.errors import ConfigError

SCHEME = "sha256:"
# 128 bits in base64 without padding. Hashes are unsalted: what can be guessed can be found.
SHORTEST_KEY = 22
_HASH = re.compile(r"sha256:[0-9a-f]{64}")

Owner = TypeVar("Owner")


def _checked_hash(value: str) -> str:
    if not _HASH.fullmatch(value):
        raise ValueError(
            "a hash is written sha256: and 64 hexadecimal digits in lower case, as "
            "`rheostat policy hash-key` prints it"
        )
    return value


KeyHash = Annotated[str, AfterValidator(_checked_hash)]


def hash_key(key: str | bytes) -> str:
    """Returns what is kept of a key: ``sha256:`` and the hexadecimal digest."""
    raw = key.encode() if isinstance(key, str) else key
    return SCHEME + hashlib.sha256(raw).hexdigest()


def generate_key() -> str:
    """Returns a new key of 256 random bits."""
    return secrets.token_urlsafe(32)


def check_strength(key: str) -> None:
    """Refuses a key that an unsalted hash would not protect, or that no header could carry.

    Raises:
        ConfigError: It is too short, or holds something else than visible ASCII characters.
    """
    if len(key) < SHORTEST_KEY:
        raise ConfigError(
            f"a key needs at least {SHORTEST_KEY} random characters, this one has {len(key)}: its "
            "hash could be guessed"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError("a key holds visible ASCII characters only, as a header does")


def presented_keys(headers: Headers) -> list[bytes]:
    """Returns the keys that a request shows: OpenAI's way, and Anthropic's ``x-api-key``."""
    keys = [_latin(value) for value in headers.getlist("x-api-key")]
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            keys.append(_latin(key))
    return [key.strip() for key in keys if key.strip()]


def owner_of(key: bytes, owners: Mapping[str, Owner]) -> Owner | None:
    """Returns whose key it is, in a time that tells nothing of the hashes.

    Args:
        key: As it was presented.
        owners: By hash, as ``hash_key`` writes it.
    """
    shown = hash_key(key)
    found = None
    for known, owner in owners.items():  # all of them, also after the one that fits
        if hmac.compare_digest(shown, known):
            found = owner
    return found


def is_any(key: bytes, hashes: Iterable[str]) -> bool:
    """Returns whether a key is one of those that are known by their hashes."""
    return owner_of(key, dict.fromkeys(hashes, True)) is True


def _latin(value: str) -> bytes:
    # Headers are bytes that starlette reads as Latin-1; the key's own bytes are what was hashed.
    return value.encode("latin-1")
