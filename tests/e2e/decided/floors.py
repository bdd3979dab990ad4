"""The floors of tests/e2e/policied.py that attacks and conversations are tried under."""

from tests.e2e.decided.asking import Floor
from tests.e2e.decided.reference import log_odds
from tests.e2e.policied import ACME, CLINIC, GRADED_SENSITIVITY, PRESS

DESK = Floor("desk", ACME, 60.0, prefill=True)
GRADED = Floor("graded", CLINIC, log_odds(GRADED_SENSITIVITY), prefill=False)
PREFILLED = Floor("prefilled", PRESS, log_odds(GRADED_SENSITIVITY), prefill=True)
