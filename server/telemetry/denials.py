"""What was denied, counted: a line of the trace stands for all that was denied alike."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from server.apis.chat import CATEGORY_FIELD
from server.dials.protocol import FIELD, RefusalOptions
from server.policies.credentials import now
from server.web.errors import Failure

# Kinds of denials of one caller between two writings; those on top are counted as one. All that
# have no key are one caller, so without one nobody fills a disk or crowds out a tenant's.
MOST_KINDS = 64
OTHER = "other"
_LONGEST_INDEX = 6
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
WORDS = frozenset({FIELD, *RefusalOptions.model_fields, CATEGORY_FIELD, "role", "content"})
WORDS |= {"X-Refusal", "X-Refusal-Policy", "Content-Type", "inputs"}


class Denial(NamedTuple):
    """What was denied to whom.

    Attributes:
        tenant: Whose request it was; none for callers who are no tenant.
        route: As the table of routes writes it.
        status: HTTP's.
        code: The error's.
        param: The path of the field, as far as it holds no word of the client's.
    """

    tenant: str | None
    route: str | None
    status: int | None
    code: str
    param: str | None


class Denied(NamedTuple):
    """Denials that are alike.

    Attributes:
        first: When the first of them was denied, in UTC.
        request_id: Of the first.
        denial: What they have in common.
        times: How many they are.
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
        words: Names that a path of the trace may hold, beside our own.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = WORDS.union(words)
        self._kinds: dict[str | None, dict[Denial, Denied]] = {}

    def add(self, failure: Failure, route: str, tenant: str | None, request_id: str | None) -> None:
        """Counts one denial.

        Args:
            failure: What the client was told.
            route: As the table of routes writes it.
            tenant: Who sent the request.
            request_id: As the request names itself; what is none is left out.
        """
        kinds = self._kinds.setdefault(tenant, {})
        denial = Denial(tenant, route, failure.status, failure.code, self._known(failure.param))
        if denial not in kinds and len(kinds) >= MOST_KINDS:
            denial = Denial(tenant, None, None, OTHER, None)
        known = kinds.get(denial)
        if known is None:
            named = request_id if request_id and _REQUEST_ID.fullmatch(request_id) else None
            known = Denied(now(), named, denial, 0)
        kinds[denial] = known._replace(times=known.times + 1)

    def take(self) -> list[Denied]:
        """Returns what was counted, and starts anew."""
        taken = [denied for kinds in self._kinds.values() for denied in kinds.values()]
        self._kinds = {}
        return taken

    def _known(self, param: str | None) -> str | None:
        # Names of fields and categories may be the client's own words.
        kept = []
        for part in (param or "").split("."):
            is_index = part.isdecimal() and len(part) <= _LONGEST_INDEX
            if not (part in self._words or is_index):
                break
            kept.append(part)
        return ".".join(kept) or None
