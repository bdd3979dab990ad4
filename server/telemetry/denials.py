"""Denials, counted: one line of the trace for all denials of one kind."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from server.apis.chat import CATEGORY_FIELD
from server.dials.protocol import FIELD, RefusalOptions
from server.policies.credentials import now
from server.web.errors import Failure

# Kinds of denials of one caller between two writings; further kinds are counted as one. All callers
# without a key are one caller, so they can neither fill a disk nor crowd out a tenant's denials.
MOST_KINDS = 64
OTHER = "other"
_LONGEST_INDEX = 6
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
WORDS = frozenset({FIELD, *RefusalOptions.model_fields, CATEGORY_FIELD, "role", "content"})
WORDS |= {"X-Refusal", "X-Refusal-Policy", "Content-Type", "inputs"}


def valid_request_id(sent: str | None) -> str | None:
    """Returns a client's request id, if it is short and plain enough to be written down."""
    return sent if sent is not None and _REQUEST_ID.fullmatch(sent) else None


class Denial(NamedTuple):
    """A kind of denial.

    Attributes:
        tenant: None for callers who are no tenant.
        route: Its pattern in the table of routes.
        status: HTTP status.
        code: The error's code.
        param: The path of the field, up to the first word of the client's.
    """

    tenant: str | None
    route: str | None
    status: int | None
    code: str
    param: str | None


class Denied(NamedTuple):
    """All denials of one kind.

    Attributes:
        first: Time of the first, in UTC.
        request_id: Of the first.
        denial: Their kind.
        times: Their number.
    """

    first: datetime
    request_id: str | None
    denial: Denial
    times: int

    def lines(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yields the one line of the trace."""
        yield {
            "time": self.first.isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "route": self.denial.route,
            "tenant": self.denial.tenant,
            "decision": "denied",
            "status": self.denial.status,
            "code": self.denial.code,
            "param": self.denial.param,
            "count": self.times,
        }


class Denials:
    """Counts denials until they are taken.

    Args:
        words: Names that a path in the trace may have, beside our own.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = WORDS.union(words)
        self._kinds: dict[str | None, dict[Denial, Denied]] = {}

    def add(self, failure: Failure, route: str, tenant: str | None, request_id: str | None) -> None:
        """Counts one denial.

        Args:
            failure: The client's error.
            route: Its pattern in the table of routes.
            tenant: None for callers who are no tenant.
            request_id: The client's; an invalid one is left out.
        """
        kinds = self._kinds.setdefault(tenant, {})
        denial = Denial(tenant, route, failure.status, failure.code, self._known(failure.param))
        if denial not in kinds and len(kinds) >= MOST_KINDS:
            denial = Denial(tenant, None, None, OTHER, None)
        known = kinds.get(denial)
        if known is None:
            known = Denied(now(), valid_request_id(request_id), denial, 0)
        kinds[denial] = known._replace(times=known.times + 1)

    def take(self) -> list[Denied]:
        """Returns the counts, and resets them."""
        taken = [denied for kinds in self._kinds.values() for denied in kinds.values()]
        self._kinds = {}
        return taken

    def _known(self, param: str | None) -> str | None:
        # Names of unknown fields and categories are the client's words.
        kept = []
        for part in (param or "").split("."):
            is_index = part.isdecimal() and len(part) <= _LONGEST_INDEX
            if not (part in self._words or is_index):
                break
            kept.append(part)
        return ".".join(kept) or None
