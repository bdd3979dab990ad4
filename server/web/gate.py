"""What may come in: known routes, known callers, bodies within their bounds."""

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from models.errors import RequestError, UnknownCallerError
from server.context import DecisionContext
from server.page.files import page_routes
from server.policies.book import Caller, CallerSource
from server.policies.credentials import hash_key, presented_keys
from server.settings import PREFIX, Settings
from server.web.access import ROUTES, Access, AccessTable, Route, route_path
from server.web.admission import Admission, Place, answers_in
from server.web.bodies import read_body
from server.web.limits import check_head, read_json, refuse_fields, refuse_headers


def served_routes(settings: Settings) -> AccessTable:
    """Returns the table of a server with these settings."""
    routes = [*ROUTES, *(page_routes() if settings.page else [])]
    return AccessTable(routes, operator=settings.operator_key_hash is not None)


@dataclass
class Arrival:
    """One request, as far as the gate knows it by now.

    Attributes:
        scope: ASGI's.
        path: As the router matches it.
        headers: Those of the scope.
        route: Where it leads; None where there is no such route.
        caller: Who sends it; None on routes that are no tenant's.
        raw: Its body; None on open routes, where nothing is read.
        body: The JSON object of a tenant's request; None where nothing was sent.
        context: What the engine is told, and what it decided; None where nothing is generated.
        place: Where it counts among the answers under way; None where the engine has no work.
    """

    scope: Scope
    path: str = field(init=False)
    headers: Headers = field(init=False)
    route: Route | None = None
    caller: Caller | None = None
    raw: bytes | None = None
    body: dict[str, Any] | None = None
    context: DecisionContext | None = None
    place: Place | None = None

    def __post_init__(self) -> None:
        self.path = route_path(self.scope)
        self.headers = Headers(scope=self.scope)


class Gate:
    """Lets in what the table of routes allows, within its bounds, from known callers.

    Args:
        settings: The bounds and the hash of the operator's key.
        callers: Knows the tenants.
        admission: Says whether a tenant's request may come in now.
        generates: Paths of the routes on which the engine works.
        reads: Paths of the operator's routes whose body is parsed too.
    """

    def __init__(
        self,
        settings: Settings,
        callers: CallerSource,
        admission: Admission,
        generates: frozenset[str],
        reads: frozenset[str],
    ) -> None:
        self._settings = settings
        self._callers = callers
        self._admission = admission
        self._generates = generates
        self._reads = reads
        self._table = served_routes(settings)

    async def admit(self, arrival: Arrival, receive: Receive) -> None:
        """Finds out the rest of an arrival.

        Raises:
            RequestError: It may not come in.
        """
        scope = arrival.scope
        check_head(scope, self._settings)
        arrival.route = route = self._table.find(scope["method"], arrival.path)
        if route.access is Access.OPEN:
            return
        headers = arrival.headers
        if route.access is Access.TENANT:
            refuse_headers(headers)
            arrival.caller = self._callers.caller(headers)
            self._admission.check(arrival.caller, generates=arrival.path in self._generates)
        else:
            self._check_operator(route, headers)
        self._check_declared(headers)
        arrival.raw = await read_body(receive, self._settings.max_body_bytes)
        if arrival.caller is not None:
            self._read_tenants(arrival, arrival.caller)
        elif arrival.raw and arrival.path in self._reads:
            arrival.body = read_json(arrival.raw, self._settings)

    def _read_tenants(self, arrival: Arrival, caller: Caller) -> None:
        # Only now: who sends a body slowly keeps nobody else out.
        if arrival.path in self._generates:
            arrival.place = self._admission.enter(caller)
        if not arrival.raw:
            return
        arrival.body = read_json(arrival.raw, self._settings)
        refuse_fields(arrival.body)
        if arrival.place is not None:
            arrival.place.widen(answers_in(arrival.body))

    def _check_operator(self, route: Route, headers: Headers) -> None:
        # Without a hash in the settings the table has no such route.
        known = self._settings.operator_key_hash
        if all(hash_key(key) != known for key in presented_keys(headers)):
            raise UnknownCallerError(
                f"{route.path} is the operator's: send `Authorization: Bearer KEY` with the "
                f"key of {PREFIX}OPERATOR_KEY_HASH"
            )

    def _check_declared(self, headers: Headers) -> None:
        limit = self._settings.max_body_bytes
        for name, value in headers.raw:
            if name == b"content-encoding" and value.strip().lower() != b"identity":
                raise RequestError(
                    "send the body as it is, without Content-Encoding",
                    status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                )
            if name == b"content-length" and value.isdigit() and int(value[:20]) > limit:
                raise RequestError(
                    f"the body is larger than {limit} bytes ({PREFIX}MAX_BODY_BYTES)",
                    status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                )
