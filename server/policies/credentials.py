"""API keys: stored as hashes, looked up by hash, read from HTTP headers.

A dictionary's look-up time may reveal how much of a stored hash matched. An attacker cannot use
that: keys with a chosen hash prefix of n bits cost 2^n hashes, and even a known hash is no key,
because keys are 256 random bits.
"""

import hashlib
import re
import secrets
from contextlib import suppress
from datetime import UTC, date, datetime, time
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from starlette.datastructures import Headers

from models.errors import ConfigError

SCHEME = "sha256:"
# 128 bits in base64 without padding. Hashes are unsalted, so a key that can be guessed is found.
SHORTEST_KEY = 22
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


def _checked_hash(value: str) -> str:
    if not _HASH.fullmatch(value):
        raise ValueError(
            "a hash is written sha256: and 64 hexadecimal digits in lower case, as "
            "`rheostat policy hash-key` prints it"
        )
    return value


KeyHash = Annotated[str, AfterValidator(_checked_hash)]


def _instant(value: Any) -> Any:
    # A quoted time is a string.
    if isinstance(value, str):
        with suppress(ValueError):
            value = datetime.fromisoformat(value) if ":" in value else date.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime.combine(value, time(), UTC)
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("write a date, 2027-01-31, or a time with its zone, 2027-01-31T12:00:00Z")
    return value


class StoredKey(BaseModel):
    """A key as the server stores it.

    Attributes:
        hash: As ``hash_key`` returns it.
        expires: The key is rejected from then on; a date means its first instant in UTC.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hash: KeyHash
    expires: Annotated[datetime, BeforeValidator(_instant)] | None = None

    def expired(self, at: datetime) -> bool:
        """Returns whether the key has expired."""
        return self.expires is not None and at >= self.expires


def _entry(value: Any) -> Any:
    if not isinstance(value, str | dict | StoredKey):
        raise ValueError("write the hash of a key, or {hash: sha256:..., expires: 2027-01-31}")
    return {"hash": value} if isinstance(value, str) else value


# In a file: a hash alone, or an object.
KeyEntry = Annotated[StoredKey, BeforeValidator(_entry)]


def hash_key(key: str | bytes) -> str:
    """Returns a key's hash: ``sha256:`` and the hexadecimal digest."""
    raw = key.encode() if isinstance(key, str) else key
    return SCHEME + hashlib.sha256(raw).hexdigest()


def generate_key() -> str:
    """Returns a new key of 256 random bits."""
    return secrets.token_urlsafe(32)


def check_strength(key: str) -> None:
    """Rejects a key that an unsalted hash would not protect, or that no header can carry.

    Raises:
        ConfigError: It is too short, or has other characters than visible ASCII.
    """
    if len(key) < SHORTEST_KEY:
        raise ConfigError(
            f"a key needs at least {SHORTEST_KEY} random characters, this one has {len(key)}: its "
            "hash could be guessed"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError("a key may have visible ASCII characters only, as a header")


def presented_keys(headers: Headers) -> list[bytes]:
    """Returns the keys of ``Authorization: Bearer`` (OpenAI) and ``x-api-key`` (Anthropic)."""
    keys = []
    for name, value in headers.raw:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                keys.append(key.strip())
    return list(filter(None, keys))


def now() -> datetime:
    """Returns the time in UTC."""
    return datetime.now(UTC)
