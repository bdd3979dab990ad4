"""How many answers may be under way: in all, of one tenant, and none once the server drains."""

import asyncio
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from models.errors import QueueFullError, RequestError, TenantFullError, UnavailableError
from server.policies.book import Caller
from server.settings import PREFIX
from server.telemetry import metrics
from server.web.limits import number, prompts_in
from server.web.score import AT_ONCE

# So many rounds of answers may wait, unless the operator says otherwise.
WAITING = 3


def answers_in(body: dict[str, Any]) -> int:
    """Returns how many answers the engine works on at once for a body."""
    inputs = body.get("inputs")
    scored = min(len(inputs), AT_ONCE) if isinstance(inputs, list) else 1
    return scored * max(1, number(body, "n"), number(body, "best_of")) * prompts_in(body)


def most_under_way(capacity: int, most_waiting: int | None) -> int:
    """Returns how many answers may be under way; the arguments are those of ``Admission``."""
    return capacity + (WAITING * capacity if most_waiting is None else most_waiting)


class Counts(Protocol):
    """The answers under way, by tenant, of all processes that admit requests for an engine."""

    def locked(self) -> AbstractContextManager[object]:
        """Keeps other processes from counting, so that a check and what it allows are one step."""

    @property
    def total(self) -> int:
        """How many there are."""

    def of(self, tenant: str | None) -> int:
        """Returns how many of a tenant there are."""

    def add(self, tenant: str | None, answers: int) -> None:
        """Counts answers, within ``locked``; fewer than 0 are under way no more."""


class OwnCounts:
    """The counts of a server whose only process this is."""

    def __init__(self) -> None:
        self.total = 0
        self._tenants: dict[str | None, int] = {}

    def locked(self) -> AbstractContextManager[object]:
        """There is nobody else."""
        return nullcontext()

    def of(self, tenant: str | None) -> int:
        """Returns how many of a tenant there are."""
        return self._tenants.get(tenant, 0)

    def add(self, tenant: str | None, answers: int) -> None:
        """Counts answers; fewer than 0 are under way no more."""
        self.total += answers
        held = self._tenants.pop(tenant, 0) + answers
        if held:  # only those stay who have something under way
            self._tenants[tenant] = held


class Admission:
    """Counts the answers under way, and says who may begin another. Nothing here waits.

    Args:
        capacity: How many answers the engine works on at once.
        most_waiting: How many more may wait for it; None: three times as many.
        counts: Those of all processes; None: this is the only one.

    Attributes:
        draining: Whether the server ends, and takes no more requests.
        held: How many answers of this process are under way.
    """

    def __init__(
        self, capacity: int, most_waiting: int | None = None, counts: Counts | None = None
    ) -> None:
        self._capacity = capacity
        self._most = most_under_way(capacity, most_waiting)
        self._counts = counts or OwnCounts()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.held = 0
        metrics.show_answers(self.held, self.waiting)
        metrics.child(metrics.MOST).set(self._most)
        metrics.child(metrics.DRAINING).set(0)

    @property
    def waiting(self) -> int:
        """How many answers of all processes wait for the engine."""
        return max(0, self._counts.total - self._capacity)

    def drain(self) -> None:
        """Takes no more requests from here on."""
        self.draining = True
        metrics.child(metrics.DRAINING).set(1)

    async def idle(self) -> None:
        """Waits until no answer is under way."""
        await self._idle.wait()

    def check(self, caller: Caller, *, generates: bool) -> None:
        """Checks whether a request may come in now.

        Args:
            caller: Who sends it.
            generates: Whether the engine works on it.

        Raises:
            UnavailableError: The server drains or is full, or the caller has enough under way.
        """
        if self.draining:
            raise UnavailableError("the server is ending: send the request again")
        if not generates:
            return
        held = self._counts.total
        if held >= self._most:
            raise QueueFullError(
                f"{held} answers are under way, and at most {self._most} may be "
                f"({PREFIX}MAX_WAITING): send the request again later"
            )
        self.check_tenant(caller, 1)

    def check_tenant(self, caller: Caller, answers: int) -> None:
        """Checks whether a caller may have more answers under way.

        Raises:
            UnavailableError: They are too many beside its others.
        """
        most = caller.max_running
        if most is None:
            return
        held = self._counts.of(caller.tenant)
        if held + answers > most:
            raise TenantFullError(
                f"{held} answers of this tenant are under way, and at most {most} may be "
                "(max_running): send the request again later"
            )

    def enter(self, caller: Caller) -> "Place":
        """Counts a request as one answer, until it leaves its place.

        Raises:
            UnavailableError: As of ``check``.
        """
        with self._counts.locked():
            self.check(caller, generates=True)
            self._counts.add(caller.tenant, 1)
        self._show(1)
        return Place(self, caller)

    def widen(self, caller: Caller, answers: int) -> None:
        """Counts more answers of a caller.

        Raises:
            UnavailableError: They are too many beside its others.
        """
        with self._counts.locked():
            self.check_tenant(caller, answers)
            self._counts.add(caller.tenant, answers)
        self._show(answers)

    def leave(self, caller: Caller, answers: int) -> None:
        """Counts answers of a caller no more."""
        with self._counts.locked():
            self._counts.add(caller.tenant, -answers)
        self._show(-answers)

    def _show(self, answers: int) -> None:
        self.held += answers
        metrics.show_answers(self.held, self.waiting)
        if self.held:
            self._idle.clear()
        else:
            self._idle.set()


class Place:
    """What one request counts for: one answer, until it is known how many it asks for.

    Args:
        admission: Where it counts already.
        caller: Whose request it is.
    """

    def __init__(self, admission: Admission, caller: Caller) -> None:
        self._admission = admission
        self._caller = caller
        self._answers = 1

    def widen(self, answers: int) -> None:
        """Counts all answers that the request asks for, once they are known.

        Raises:
            RequestError: They alone are more than the caller may ever have under way.
            UnavailableError: They are more than the caller may have now.
        """
        most = self._caller.max_running
        if most is not None and answers > most:
            raise RequestError(
                f"the request asks for {answers} answers at once, and at most {most} of this "
                "tenant may be under way (max_running): lower n, or send fewer prompts",
                param="n",
            )
        if answers > self._answers:
            self._admission.widen(self._caller, answers - self._answers)
            self._answers = answers

    def leave(self) -> None:
        """Counts the request no more."""
        self._admission.leave(self._caller, self._answers)
        self._answers = 0
