"""What schemathesis holds every answer to, beside its own checks; it loads this as its hooks."""

from typing import Any

import schemathesis


@schemathesis.check
def error_is_openais(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> bool | None:
    """Holds an error to a JSON body with a message, and no stream or page in its place."""
    if response.status_code < 400 or case.method.upper() == "HEAD":
        return None
    try:
        told: Any = response.json()
    except ValueError:
        told = None
    error = told.get("error") if isinstance(told, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        raise AssertionError(f"not OpenAI's error body: {response.content[:300]!r}")
    return None
