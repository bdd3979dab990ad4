"""Who may reach which route. What is not in the table does not exist for anybody."""

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from http import HTTPStatus
from typing import NamedTuple

from starlette.types import Scope

from models.errors import RequestError, shortened

# The label of requests that reach no route.
NO_ROUTE = "none"


class Access(Enum):
    """Who may reach a route."""

    OPEN = "open"
    TENANT = "tenant"
    OPERATOR = "operator"
    OFF = "off"


class Route(NamedTuple):
    """One route of vLLM's server or of ours.

    Attributes:
        method: HTTP's.
        path: As the router writes it: ``{name}`` stands for one segment, ``{name:path}`` for
            several.
        access: Who may reach it.
        reason: Why it is off; the client is told.
    """

    method: str
    path: str
    access: Access
    reason: str = ""


_READS_DECISION_STEP = (
    "it reads the first decoding step, which is the decision step here, so it is not served"
)
_NOT_TEXT = "a checkpoint with refusal tokens generates text, so it is not served"
_RAW_ENGINE = (
    "it takes the engine's own sampling parameters, which could skip the decision, so it is not "
    "served"
)
_UNSHAPED = "its answers are not shaped here, so it is not served"


def _all(access: Access, method: str, *paths: str, reason: str = "") -> list[Route]:
    return [Route(method, path, access, reason) for path in paths]


ROUTES: tuple[Route, ...] = (
    *_all(Access.OPEN, "GET", "/healthz", "/livez", "/startupz", "/readyz", "/health", "/ping"),
    *_all(Access.OPEN, "POST", "/ping"),
    *_all(
        Access.TENANT,
        "POST",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/{response_id}/cancel",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/invocations",
        "/v1/refusal/score",
    ),
    *_all(
        Access.TENANT,
        "GET",
        "/v1/models",
        "/v1/responses/{response_id}",
        "/v1/refusal/categories",
        "/v1/refusal/calibration",
        "/v1/refusal/policies",
    ),
    *_all(
        Access.OPERATOR,
        "GET",
        "/metrics",
        "/load",
        "/version",
        "/kv_event_sources",
        "/tokenizer_info",
        "/openapi.json",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/static/{path:path}",
        "/server_info",
        "/is_sleeping",
        "/is_paused",
        "/weight_info",
        "/get_world_size",
        "/fault_tolerance/status",
    ),
    *_all(
        Access.OPERATOR,
        "POST",
        "/tokenize",
        "/detokenize",
        "/v1/chat/completions/render",
        "/v1/chat/completions/derender",
        "/v1/completions/render",
        "/v1/completions/derender",
        "/v1/messages/render",
        "/v1/responses/render",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/adapters",
        "/start_profile",
        "/stop_profile",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/collective_rpc",
        "/sleep",
        "/wake_up",
        "/release_kv_cache_memory",
        "/pause",
        "/resume",
        "/abort_requests",
        "/inference/v1/abort_requests",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/update_weight_version",
        "/weight_checker",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/fault_tolerance/apply",
    ),
    *_all(Access.OPERATOR, "DELETE", "/adapters/{adapter_name}"),
    *_all(
        Access.OFF,
        "POST",
        "/generative_scoring",
        "/v1/systemone",
        "/v1/decisions",
        reason=_READS_DECISION_STEP,
    ),
    *_all(Access.OFF, "POST", "/inference/v1/generate", reason=_RAW_ENGINE),
    *_all(Access.OFF, "POST", "/cohere/v2/chat", "/cohere/v2/chat/render", reason=_UNSHAPED),
    *_all(
        Access.OFF,
        "POST",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/embeddings",
        "/v2/embed",
        reason=_NOT_TEXT,
    ),
)


class AccessTable:
    """Finds the route that a request would reach.

    Args:
        routes: All that exist.
        operator: Whether the operator has set a key; without one its routes do not exist.
    """

    def __init__(self, routes: Iterable[Route] = ROUTES, *, operator: bool = False) -> None:
        self._operator = operator
        self._plain: dict[str, dict[str, Route]] = {}
        self._templates: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        methods_of: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods_of.setdefault(route.path, {})[route.method] = route
        for path, methods in methods_of.items():
            if "{" in path:
                self._templates.append((_pattern(path), methods))
            else:
                self._plain[path] = methods

    def find(self, method: str, path: str) -> Route:
        """Returns the route of a request.

        Args:
            method: HTTP's. HEAD reaches what GET does.
            path: As ``route_path`` returns it.

        Raises:
            RequestError: 404 where there is none, or none for anybody; 405 where the path has
                other methods.
        """
        methods = self._methods(path)
        route = methods.get("GET" if method == "HEAD" else method)
        known = [] if route else [one.method for one in methods.values() if self._exists(one)]
        if known:
            allowed = ", ".join(sorted(known))
            raise RequestError(
                f"{path} takes {allowed}, not {_shown(method)}",
                status=HTTPStatus.METHOD_NOT_ALLOWED,
                headers={"allow": allowed},
            )
        if route is not None and route.access is Access.OFF:
            raise RequestError(f"{route.path}: {route.reason}", status=HTTPStatus.NOT_FOUND)
        if route is not None and not self._exists(route):
            raise RequestError(
                f"{route.path} is the operator's, and this server has no operator's key: set "
                "RHEOSTAT_OPERATOR_KEY_HASH to turn it on",
                status=HTTPStatus.NOT_FOUND,
            )
        if route is None:
            raise RequestError(
                f"there is no {_shown(method)} {_shown(path)} here", status=HTTPStatus.NOT_FOUND
            )
        return route

    def _methods(self, path: str) -> Mapping[str, Route]:
        if (methods := self._plain.get(path)) is not None:
            return methods
        for pattern, methods in self._templates:
            if pattern.fullmatch(path):
                return methods
        return {}

    def _exists(self, route: Route) -> bool:
        return route.access is not Access.OFF and (
            self._operator or route.access is not Access.OPERATOR
        )


def route_path(scope: Scope) -> str:
    """Returns the path that starlette's router will match: without the root path."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _pattern(path: str) -> re.Pattern[str]:
    # Visible ASCII only. `$` in starlette's patterns also lets a line feed at the end through.
    segments = []
    for part in re.split(r"(\{[^}]*\})", path):
        if part.endswith(":path}"):
            segments.append(r"(?!.*\.\.)[!-~]+")
        elif part.startswith("{"):
            segments.append("[!-.0-~]+")
        else:
            segments.append(re.escape(part))
    return re.compile("".join(segments))


def _shown(text: str) -> str:
    printable = text if text.isprintable() else ascii(text)
    return shortened(printable)
