"""Every error that Rheostat raises on purpose.

RheostatError
├── RequestError           the caller can fix it (HTTP 4xx), or wait
│   ├── UnknownCallerError no known key (401)
│   │   └── ExpiredKeyError   an expired key
│   ├── ContextLengthError the prompt is longer than the model's context allows (400)
│   ├── NotAllowedError    the caller's policies do not allow it (403)
│   └── UnavailableError   not now: the same request may be sent again (503)
│       ├── QueueFullError    too much waits for the engine (429)
│       └── TenantFullError   the tenant has as much under way as it may (429)
└── ServiceError           the operator can fix it (HTTP 5xx; one line and exit 1 on the CLI)
    ├── CheckpointError    the model folder breaks the contract of models/manifest.py
    ├── ConfigError        a settings, recipe or data file is wrong
    └── EvaluationError    a measurement failed
"""

MOST_QUOTED = 80


def shortened(text: str, most: int = MOST_QUOTED) -> str:
    """Returns a text of unknown length, cut to so many characters for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


class RheostatError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        code: Stable identifier for programs.
        message: What was wrong, where, and what would be right.
    """

    code = "rheostat_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(RheostatError):
    """A request that cannot be served.

    Attributes:
        status: HTTP status.
        param: Path of the offending field, such as ``refusal.categories.safety``.
        headers: Further headers of the answer.
    """

    code = "invalid_request"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 422,
        headers: dict[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.param = param
        self.status = status
        self.headers = headers


class ContextLengthError(RequestError):
    """A prompt that is longer than the model's context allows."""

    code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, status=400)


class UnknownCallerError(RequestError):
    """A request without a known key, to a server that wants one."""

    code = "invalid_api_key"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, status=401, headers={"www-authenticate": "Bearer"})


class ExpiredKeyError(UnknownCallerError):
    """A request with an expired key."""

    code = "expired_api_key"


class NotAllowedError(RequestError):
    """A request that the caller's policies do not allow."""

    code = "not_allowed"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, status=403)


class UnavailableError(RequestError):
    """A request that is not served now and may be sent again."""

    code = "unavailable"

    def __init__(self, message: str, *, status: int = 503) -> None:
        # Long enough for a place to come free, or for a gateway to know of another server.
        super().__init__(message, status=status, headers={"retry-after": "1"})


class QueueFullError(UnavailableError):
    """A request to a server on whose engine too much waits."""

    code = "queue_full"

    def __init__(self, message: str) -> None:
        super().__init__(message, status=429)


class TenantFullError(UnavailableError):
    """A request of a tenant that has as much under way as it may."""

    code = "tenant_full"

    def __init__(self, message: str) -> None:
        super().__init__(message, status=429)


class ServiceError(RheostatError):
    """A problem that the operator can fix."""

    code = "service_error"


class CheckpointError(ServiceError):
    """A model folder that cannot be served: the message names the file and the token."""

    code = "invalid_checkpoint"


class ConfigError(ServiceError):
    """An invalid settings, recipe or data file: the message names file and field."""

    code = "invalid_config"


class EvaluationError(ServiceError):
    """A failed measurement."""

    code = "evaluation_failed"
