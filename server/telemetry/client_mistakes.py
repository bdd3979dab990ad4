"""Keeps clients' mistakes out of vLLM's log, where some fill a screen."""

import logging

from server.context import DECISION_CONTEXT


class ClientMistakes(logging.Filter):
    """Drops vLLM's log records of requests that end with 4xx.

    The access log has a line for each of them, and the trace has the reason. Level DEBUG and vLLM's
    --log-error-stack drop nothing.

    Args:
        kinds: Types that are a client's mistake, as an exception or as a record's argument.
    """

    def __init__(self, kinds: tuple[type, ...]) -> None:
        super().__init__()
        self._kinds = kinds

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a record is logged."""
        if record.levelno < logging.WARNING or logging.getLogger(record.name).isEnabledFor(
            logging.DEBUG
        ):
            return True
        arguments = record.args if isinstance(record.args, tuple) else ()
        causes = [*arguments, record.exc_info[1] if record.exc_info else None]
        # A template may raise any exception about a conversation.
        kinds = self._kinds
        if record.name.startswith("vllm.renderers."):
            kinds = (*kinds, Exception)
        elif record.name.startswith("vllm.entrypoints.anthropic."):
            kinds = (*kinds, ValueError)  # this route logs what it answers with 400
        return not (any(isinstance(cause, kinds) for cause in causes) or _rejected(record))


def _rejected(record: logging.LogRecord) -> bool:
    context = DECISION_CONTEXT.get()
    failure = context.failure if context is not None else None
    return record.exc_info is not None and failure is not None and failure.status < 500


def drop_client_mistakes(kinds: tuple[type, ...]) -> None:
    """Adds the filter to vLLM's log."""
    filtered = ClientMistakes(kinds)
    for handler in (*logging.getLogger("vllm").handlers, *logging.getLogger().handlers):
        handler.addFilter(filtered)
