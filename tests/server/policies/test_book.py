import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from models.controls import Controls, Rule
from models.errors import ExpiredKeyError, NotAllowedError, UnknownCallerError
from server.dials.protocol import parse_options
from server.policies.book import Caller, PolicyBook
from server.policies.credentials import hash_key
from tests.server.boards import board
from tests.server.policybooks import ACME_KEY, SECRET, SHOP_KEY, TWO_TENANTS, book, headers


@pytest.fixture
def policies(tmp_path: Path) -> PolicyBook:
    return book(tmp_path)


# who calls


@pytest.mark.parametrize(
    ("sent", "tenant"),
    [
        ({"authorization": f"Bearer {ACME_KEY}"}, "acme"),
        ({"authorization": f"bearer {SHOP_KEY}"}, "shop"),
        ({"x_api_key": ACME_KEY}, "acme"),
        ({"x_api_key": ACME_KEY, "authorization": "Bearer unused"}, "acme"),
        ({"x_api_key": ACME_KEY, "authorization": f"Bearer {ACME_KEY}"}, "acme"),
        ({"x_tenant": "shop-1", "x_gateway_secret": SECRET}, "shop"),
        ({"x_tenant": "shop-1", "x_gateway_secret": SECRET, "x_api_key": SHOP_KEY}, "shop"),
        # A gateway's own clients bring keys that mean nothing here.
        ({"x_tenant": "shop-1", "x_gateway_secret": SECRET, "x_api_key": "other"}, "shop"),
        ({"x_gateway_secret": SECRET, "x_api_key": ACME_KEY}, "acme"),
    ],
)
def test_caller_is_known_by_key_or_by_the_gateways_word(
    policies: PolicyBook, sent: dict[str, str], tenant: str
) -> None:
    assert policies.caller(headers(**sent)).tenant == tenant


NOBODY: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer unused"},
    {"authorization": f"Basic {ACME_KEY}"},
    {"authorization": ACME_KEY},
    {"x_api_key": ""},
    {"x_api_key": ACME_KEY + "x"},
    {"x_api_key": ACME_KEY[:-1]},
    {"x_api_key": SECRET},
    {"x_gateway_secret": SECRET},
    {"x_tenant": "acme", "x_gateway_secret": SECRET},
    {"x_tenant": "", "x_gateway_secret": SECRET},
]
UNTRUSTED: list[dict[str, str]] = [
    {"x_tenant": "shop-1"},
    {"x_tenant": "shop-1", "x_gateway_secret": ""},
    {"x_tenant": "shop-1", "x_gateway_secret": SECRET + "x"},
    {"x_tenant": "shop-1", "x_api_key": ACME_KEY},
    {"x_gateway_secret": "guessed", "x_api_key": ACME_KEY},
    {"x_tenant": "shop-1", "x_gateway_secret": SECRET, "x_api_key": ACME_KEY},
    {"x_api_key": ACME_KEY, "authorization": f"Bearer {SHOP_KEY}"},
]


@pytest.mark.parametrize("sent", [*NOBODY, *UNTRUSTED], ids=str)
def test_nobody_else_may_call_where_there_is_no_policy_for_them(
    policies: PolicyBook, sent: dict[str, str]
) -> None:
    with pytest.raises(UnknownCallerError) as caught:
        policies.caller(headers(**sent))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    for secret in (ACME_KEY, SHOP_KEY, SECRET):
        assert secret not in caught.value.message


def test_unknown_callers_follow_the_policy_for_them(tmp_path: Path) -> None:
    open_to_all = book(tmp_path, TWO_TENANTS + "anonymous: kiosk\n")
    for sent in NOBODY:
        caller = open_to_all.caller(headers(**sent))
        assert (caller.tenant, [p.name for p in caller.policies]) == (None, ["kiosk"])
    for sent in UNTRUSTED:
        with pytest.raises(UnknownCallerError):
            open_to_all.caller(headers(**sent))
    assert open_to_all.caller(headers(x_api_key=ACME_KEY)).tenant == "acme"


@pytest.mark.parametrize(
    "repeated",
    [
        [("x-tenant", "shop-1"), ("x-tenant", "shop-1"), ("x-gateway-secret", SECRET)],
        [("x-tenant", "acme"), ("x-tenant", "shop-1"), ("x-gateway-secret", SECRET)],
        [("x-tenant", "shop-1"), ("x-gateway-secret", SECRET), ("x-gateway-secret", "guess")],
    ],
)
def test_header_that_a_client_smuggled_in_beside_the_gateways_is_refused(
    policies: PolicyBook, repeated: list[tuple[str, str]]
) -> None:
    raw = [(name.encode(), value.encode()) for name, value in repeated]
    with pytest.raises(UnknownCallerError, match="counts only once"):
        policies.caller(Headers(raw=raw))


def test_tenant_that_only_the_gateway_knows_is_told_so(policies: PolicyBook) -> None:
    vouched = {"x_tenant": "shop-9", "x_gateway_secret": SECRET}
    with pytest.raises(UnknownCallerError, match="x-tenant: this server knows no tenant"):
        policies.caller(headers(**vouched))
    assert policies.caller(headers(**vouched, x_api_key=ACME_KEY)).tenant == "acme"


def test_header_without_a_gateway_means_nothing(tmp_path: Path) -> None:
    text = "policies: {p: {}}\nanonymous: p\n"
    caller = book(tmp_path, text).caller(headers(x_tenant="acme", x_gateway_secret=SECRET))
    assert caller.tenant is None


def test_server_without_a_policy_file_serves_everybody_or_whoever_has_a_key() -> None:
    everybody = PolicyBook.for_everybody(board())
    assert everybody.caller(headers()).policy().name == "default"
    keyed = PolicyBook.for_everybody(board(), ["one", "two"])
    for key in ("one", "two"):
        assert keyed.caller(headers(authorization=f"Bearer {key}")).policy().name == "default"
    both = headers(authorization="Bearer one", x_api_key="two")
    assert keyed.caller(both).policy().name == "default"
    with pytest.raises(UnknownCallerError):
        keyed.caller(headers(authorization="Bearer three"))


# keys that expire

ENDS = datetime(2027, 1, 31, tzinfo=UTC)
EXPIRING = TWO_TENANTS.replace(
    f'["{hash_key(ACME_KEY)}"]', f"[{{hash: {hash_key(ACME_KEY)}, expires: 2027-01-31}}]"
).replace(
    f'["{hash_key(SECRET)}"]', f"[{{hash: {hash_key(SECRET)}, expires: 2027-01-31T00:00:00Z}}]"
)
BY_KEY = {"x_api_key": ACME_KEY}
BY_GATEWAY = {"x_tenant": "shop-1", "x_gateway_secret": SECRET}


@pytest.mark.parametrize("sent", [BY_KEY, BY_GATEWAY], ids=["key", "secret"])
@pytest.mark.parametrize("anonymous", ["", "anonymous: kiosk\n"])
def test_expired_key_is_refused_without_a_reload_and_its_holder_told_so(
    tmp_path: Path, sent: dict[str, str], anonymous: str
) -> None:
    policies = book(tmp_path, EXPIRING + anonymous)
    before = replace(policies, clock=lambda: ENDS - timedelta(seconds=1))
    assert before.caller(headers(**sent)).tenant in ("acme", "shop")
    after = replace(policies, clock=lambda: ENDS)
    with pytest.raises(ExpiredKeyError, match="expired at 2027-01-31 00:00:00") as caught:
        after.caller(headers(**sent))
    assert (caught.value.status, caught.value.code) == (401, "expired_api_key")
    assert after.caller(headers(x_api_key=SHOP_KEY)).tenant == "shop"


def test_other_callers_do_not_learn_of_an_expired_key(tmp_path: Path) -> None:
    after = replace(book(tmp_path, EXPIRING), clock=lambda: ENDS)
    for sent in ({"x_api_key": ACME_KEY[:-1]}, {"x_tenant": "shop-1", "x_gateway_secret": "no"}):
        with pytest.raises(UnknownCallerError) as caught:
            after.caller(headers(**sent))
        assert "expired" not in caught.value.message


# which policy


def test_first_policy_is_the_default_and_the_others_may_be_chosen(policies: PolicyBook) -> None:
    acme = policies.caller(headers(x_api_key=ACME_KEY))
    assert acme.policy().name == "desk"
    assert acme.policy("desk").name == "desk"
    assert acme.policy("lab").name == "lab"


def test_refusal_of_a_choice_does_not_tell_whether_others_have_it(policies: PolicyBook) -> None:
    acme = policies.caller(headers(x_api_key=ACME_KEY))
    messages = []
    for name in ("kiosk", "absent", "", "Desk", "\ud800", "x" * 10_000):
        with pytest.raises(NotAllowedError) as caught:
            acme.policy(name)
        assert (caught.value.status, caught.value.param) == (403, "refusal.policy")
        assert len(caught.value.message) < 200
        messages.append(caught.value.message.replace(repr(name), "NAME"))
    assert (
        messages[0]
        == messages[1]
        == "refusal.policy: this caller may choose from desk, lab, not NAME"
    )


def test_reports_may_be_kept_from_a_policys_requests(tmp_path: Path) -> None:
    text = "policies: {p: {report: false}}\nanonymous: p\n"
    policy = book(tmp_path, text).caller(headers()).policy()
    assert policy.reports(parse_options({})) is False
    assert policy.reports(parse_options({"report": False})) is False
    with pytest.raises(NotAllowedError, match="no reports"):
        policy.reports(parse_options({"report": True}))


# what a tenant is told


def test_description_shows_bounds_in_both_units(tmp_path: Path) -> None:
    text = """\
policies:
  p:
    defaults: {categories: {humanizing: never}}
    floors: {safety: 0.5}
    ceilings: {safety: always, humanizing: 0.5}
    refusal_text: {safety: "No."}
    outside: refuse
    control_text: refuse
anonymous: p
"""
    described = book(tmp_path, text).policies["p"].describe()
    assert described == {
        "object": "refusal.policy",
        "name": "p",
        "decision": "greedy",
        "outside": "refuse",
        "enforce": True,
        "raw_prompts": False,
        "prefill": False,
        "grammars": False,
        "refusal_in": None,
        "control_text": "refuse",
        "report": False,
        "categories": {
            "safety": {
                "default": {"bias": 0.0, "sensitivity": 0.5},
                "floor": {"bias": 0.0, "sensitivity": 0.5},
                "ceiling": None,
                "refusal_text": "No.",
            },
            "humanizing": {
                "default": {"bias": "never", "sensitivity": 0.0},
                "floor": None,
                "ceiling": {"bias": 0.0, "sensitivity": 0.5},
                "refusal_text": "generated",
            },
        },
    }
    json.dumps(described, allow_nan=False)


# what comes from no request


def test_strictest_is_below_no_policys_floor(policies: PolicyBook) -> None:
    controls = policies.strictest().controls
    assert controls.rule is Rule.GREEDY
    assert controls.bias[0] == policies.policies["desk"].board.bounds.floors[0] > 0
    assert controls.bias[1] == 0.0


def test_strictest_of_a_server_without_floors_is_its_defaults() -> None:
    defaults = parse_options({"decision": "sample", "categories": {"safety": "never"}})
    everybody = PolicyBook.for_everybody(board(defaults))
    assert everybody.strictest().controls == Controls(
        Rule.SAMPLE, (float("-inf"), 0.0), (True, False)
    )
    assert isinstance(everybody.anonymous, Caller)
