import logging
from collections.abc import Iterator

import pytest

from server.context import DECISION_CONTEXT, DecisionContext
from server.telemetry.client_mistakes import ClientMistakes
from server.web.errors import failure
from tests.server.boards import board

FILTER = ClientMistakes((KeyError,))


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("test.mistakes")
    logger.setLevel(logging.INFO)
    logger.addFilter(FILTER)
    yield logger
    logger.removeFilter(FILTER)


def log(logger: logging.Logger, error: Exception, message: str = "failed: %s") -> None:
    try:
        raise error
    except Exception as caught:
        logger.exception(message, caught)


def test_clients_mistake_is_not_logged_and_a_fault_is(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    log(logger, KeyError("theirs"))
    logger.error("failed: %s", KeyError("theirs"))
    log(logger, RuntimeError("fault"))
    logger.error("failed: %s", "fault")
    logger.info("for your information: %s", KeyError("theirs"))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["failed: fault", "failed: fault", "for your information: 'theirs'"]


def test_everything_is_logged_for_whoever_debugs(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    logger.setLevel(logging.DEBUG)
    log(logger, KeyError("theirs"))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("status", "logged"), [(400, 0), (500, 1)])
def test_what_comes_of_a_rejected_request_is_not_logged(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture, status: int, logged: int
) -> None:
    context = DecisionContext(board().unasked, failure=failure(status, "m"))
    token = DECISION_CONTEXT.set(context)
    try:
        log(logger, TypeError("vLLM cannot read its own error"))
    finally:
        DECISION_CONTEXT.reset(token)
    assert len(caplog.records) == logged


@pytest.mark.parametrize("name", ["vllm.renderers.hf", "vllm.entrypoints.anthropic.api_router"])
def test_what_is_said_of_a_conversation_is_the_clients(name: str) -> None:
    def logged(*arguments: object) -> bool:
        record = logging.LogRecord(name, logging.WARNING, "", 1, "%s", arguments, None)
        return FILTER.filter(record)

    assert not logged(ValueError("no message"))
    assert logged("a template of no roles")
