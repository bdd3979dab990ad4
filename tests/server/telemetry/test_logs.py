import json
import subprocess
import sys

# In a process of its own: the factory of log records is everybody's.
PROGRAM = """
import logging, sys
from pythonjsonlogger.json import JsonFormatter
from server.context import DECISION_CONTEXT, DecisionContext
from server.telemetry.logs import log_as_json, request_named
from server.web.answer import Answer
from server.web.gate import Arrival
from tests.server.contexts import context_of

vllm = logging.StreamHandler(sys.stdout)
vllm.setFormatter(JsonFormatter("%(levelname)s %(name)s %(message)s"))
logging.getLogger("vllm").addHandler(vllm)
own = logging.StreamHandler(sys.stdout)
logging.getLogger("server").addHandler(own)
log_as_json()

def arrival(sent):
    headers = [(b"x-request-id", sent)] if sent else []
    return Arrival({"type": "http", "path": "/", "headers": headers})

def log(sent):
    with request_named(arrival(sent), None):
        logging.getLogger("server.web").warning("said")

log(b"from-the-gateway")
log(b"a secret question?")
log(None)
decided = context_of()
decided.request_ids.append("chatcmpl-1")
DECISION_CONTEXT.set(decided)
log(None)
log(b"from-the-gateway")
try:
    raise ValueError("two\\nlines")
except ValueError:
    logging.getLogger("vllm.engine").exception("failed")
"""


def test_lines_are_json_and_name_the_request() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout
    *said, failed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["message"] for line in said] == ["said"] * 5
    assert [line.get("request_id") for line in said] == [
        "from-the-gateway",
        None,
        None,
        "chatcmpl-1",
        "from-the-gateway",
    ]
    assert (failed["name"], failed["request_id"]) == ("vllm.engine", "chatcmpl-1")
    assert "ValueError" in failed["exc_info"]
