"""Every error that Rheostat raises on purpose.

RheostatError
├── RequestError           the caller can mend it (HTTP 4xx)
│   ├── UnknownCallerError nobody that the server knows is calling (401)
│   │   └── ExpiredKeyError   somebody whose key has expired is
│   ├── ContextLengthError the prompt is longer than the model's context allows (400)
│   └── NotAllowedError    the caller's policies do not allow it (403)
└── ServiceError           the operator can mend it (HTTP 5xx; one line and exit 1 on the CLI)
    ├── CheckpointError    the model folder does not keep the contract of models/manifest.py
    ├── ConfigError        a settings, recipe or data file is wrong
    └── EvaluationError    a measurement could not be made
"""

MOST_QUOTED = 80


def shortened(text: str, most: int = MOST_QUOTED) -> str:
    """Returns what a message may quote of a text of unknown length, in characters."""
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
    """A request that cannot be served as it was sent.

    Attributes:
        status: HTTP status, 4xx.
        param: Path of the offending field, such as ``refusal.categories.safety``.
        headers: What HTTP wants beside the status.
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
    """A prompt that the model's context has no place for."""

    code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, status=400)


class UnknownCallerError(RequestError):
    """A request without a key that the server knows, where it answers nobody else."""

    code = "invalid_api_key"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, status=401, headers={"www-authenticate": "Bearer"})


class ExpiredKeyError(UnknownCallerError):
    """A request with a key that was good once."""

    code = "expired_api_key"


class NotAllowedError(RequestError):
    """A request for what the caller's policies do not allow."""

    code = "not_allowed"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, status=403)


class ServiceError(RheostatError):
    """Something on the operator's side is wrong."""

    code = "service_error"


class CheckpointError(ServiceError):
    """A model folder that cannot be served: the message names the file and the token."""

    code = "invalid_checkpoint"


class ConfigError(ServiceError):
    """A settings, recipe or data file that cannot be used: the message names file and field."""

    code = "invalid_config"


class EvaluationError(ServiceError):
    """A measurement that could not be made."""

    code = "evaluation_failed"
