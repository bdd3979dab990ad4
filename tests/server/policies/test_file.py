from pathlib import Path

import pytest

from models.solver import Target
from server.policies.credentials import StoredKey, hash_key
from server.policies.file import PolicyEntry, PolicyFile, ReadPolicies, read_policy_file
from server.policies.source import FileError

KEY = hash_key("k" * 32)
OTHER = hash_key("l" * 32)
# Line 1 is `version`; `desk` stands on line 3, `lab` on line 14, `tenants` on line 16.
WHOLE = f"""\
version: 1
policies:
  desk:
    defaults: {{categories: {{safety: 0.9}}, report: true}}
    floors:
      safety: 0.8
      humanizing: {{rate: 0.3}}
    ceilings:
      safety: always
    outside: refuse
    refusal_text:
      safety: "No."
      humanizing: template
  lab:
    enforce: false
tenants:
  Acme-1:
    policies: [desk, lab]
    keys:
      - {KEY}
  shop:
    policies: [lab]
    header: shop
gateway:
  tenant_header: X-Tenant
  secret_header: X-Gateway-Secret
  secrets: ["{OTHER}"]
anonymous: null
"""


def read(tmp_path: Path, text: str) -> ReadPolicies:
    path = tmp_path / "policies.yaml"
    path.write_text(text)
    return read_policy_file(path)


def problems(tmp_path: Path, text: str) -> list[str]:
    """Returns what is wrong with a file, each as `LINE: FIELD: what`."""
    with pytest.raises(FileError) as caught:
        read(tmp_path, text)
    prefix = f"{tmp_path / 'policies.yaml'}:"
    assert all(problem.startswith(prefix) for problem in caught.value.problems)
    return [problem.removeprefix(prefix) for problem in caught.value.problems]


def test_whole_file_is_read(tmp_path: Path) -> None:
    file = read(tmp_path, WHOLE).file
    desk, lab = file.policies["desk"], file.policies["lab"]
    assert desk.defaults.report is True
    assert desk.floors["humanizing"] == Target(rate=0.3)
    assert (desk.outside, desk.enforce, desk.raw_prompts, desk.control_text) == (
        "refuse",
        True,
        None,
        "plain",
    )
    assert [desk.refusal_text_of(c) for c in ("safety", "humanizing", "incomplete")] == [
        "No.",
        "template",
        "generated",
    ]
    assert (lab.enforce, lab.floors, lab.refusal_text_of("safety")) == (False, {}, "generated")
    assert file.tenants["Acme-1"].policies == ("desk", "lab")
    assert file.tenants["Acme-1"].keys == (StoredKey(hash=KEY),)
    assert file.gateway is not None
    assert (file.gateway.tenant_header, file.gateway.secret_header) == (
        "x-tenant",
        "x-gateway-secret",
    )
    assert file.anonymous is None


def test_smallest_file_is_one_policy_for_everybody(tmp_path: Path) -> None:
    assert read(tmp_path, "policies: {open: {}}\nanonymous: open\n").file == PolicyFile(
        policies={"open": PolicyEntry()},
        anonymous="open",
    )


def test_shared_parts_may_be_written_once(tmp_path: Path) -> None:
    text = """\
policies:
  desk: &desk
    floors: {safety: 0.8}
  lab:
    <<: *desk
    enforce: false
anonymous: lab
"""
    lab = read(tmp_path, text).file.policies["lab"]
    assert (lab.floors["safety"].bias is not None, lab.enforce) == (True, False)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("version: 1", "version: 2", "1: version: Input should be 1"),
        ("    outside: refuse", "    outsid: refuse", "10: policies.desk.outsid: unknown field"),
        ("    outside: refuse", "    outside: ban", "10: policies.desk.outside: Input should be"),
        ("      safety: 0.8", "      safety: 1.8", "6: policies.desk.floors.safety: a sensi"),
        ("      safety: 0.8", "      safety: off", "6: policies.desk.floors.safety: a sensi"),
        ("      safety: 0.8", "      Safety: 0.8", "6: policies.desk.floors.Safety: String"),
        ("      safety: 0.8", "      safety: 0.8\n      safety: 0.1", "7: invalid YAML: duplic"),
        ("report: true", "report: maybe", "4: policies.desk.defaults.report: "),
        ("report: true", "policy: lab", "4: policies.desk.defaults.policy: unknown field; known"),
        ("    enforce: false", '    enforce: "false"', "15: policies.lab.enforce: Input should"),
        ("    enforce: false", "    enforce: 0", "15: policies.lab.enforce: Input should be a"),
        ('safety: "No."', "safety: 5", "11: policies.desk.refusal_text: must be generated"),
        ('safety: "No."', 'safety: " "', "11: policies.desk.refusal_text: must be generated"),
        ("  lab:\n", "  Lab:\n", "14: policies.Lab: String should match"),
        ("[desk, lab]", "[]", "18: tenants.Acme-1.policies: Tuple should have at least 1"),
        ("[desk, lab]", "[desk, desk]", "18: tenants.Acme-1.policies: duplicate desk"),
        ("[desk, lab]", "[desk, labs]", "18: tenants.Acme-1.policies.1: no policy is named 'labs'"),
        (f"- {KEY}", "- secret", "20: tenants.Acme-1.keys.0.hash: a hash is written sha256:"),
        (f"- {KEY}", f"- {{hash: {KEY}, ends: 1}}", "20: tenants.Acme-1.keys.0.ends: unknown f"),
        (f"- {KEY}", f"- {{hash: {KEY}, expires: now}}", "20: tenants.Acme-1.keys.0.expires: wri"),
        (f"- {KEY}", "- 5", "20: tenants.Acme-1.keys.0: write the hash of a key"),
        (f"- {KEY}", f"- {OTHER}", "20: tenants.Acme-1.keys.0: is the key of the gateway"),
        ("Acme-1:", "Acme 1:", "17: tenants.Acme 1: String should match"),
        ("header: shop", "", "21: tenants.shop: needs keys, or a header"),
        ("header: shop", "max_running: 0", "23: tenants.shop.max_running: Input should be greater"),
        ("header: shop", "max_running: '3'", "23: tenants.shop.max_running: Input should be a v"),
        ("anonymous: null", "anonymous_max_running: 1", "28: anonymous_max_running: without `anon"),
        ("header: shop", "header: [shop]", "23: tenants.shop.header: Input should be a valid"),
        ("header: shop", 'header: " shop"', "23: tenants.shop.header: String should match"),
        ("X-Tenant", "Authorization", "25: gateway.tenant_header: 'Authorization' cannot be"),
        ("X-Tenant", "X-Refusal", "25: gateway.tenant_header: 'X-Refusal' cannot be the name"),
        ("X-Tenant", "X Tenant", "25: gateway.tenant_header: 'X Tenant' cannot be the name"),
        ("X-Tenant", "x-gateway-secret", "26: gateway.secret_header: must be another header"),
        (f'["{OTHER}"]', "[]", "27: gateway.secrets: Tuple should have at least 1 item"),
        ("anonymous: null", "anonymous: nobody", "28: anonymous: no policy is named 'nobody'"),
        ("anonymous: null", "anonymus: desk", "28: anonymus: unknown field; known here are vers"),
        ("safety: always", "safety: 0.7", "6: policies.desk.floors.safety: lies above the cat"),
        (
            "report: true}",
            "decision: sample}",
            "4: policies.desk.defaults.decision: a policy with floors decides by greedy",
        ),
    ],
)
def test_wrong_field_is_told_with_its_line(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    assert WHOLE.count(old) == 1
    told = problems(tmp_path, WHOLE.replace(old, new))
    assert len(told) == 1
    assert told[0].startswith(problem)


def test_all_problems_are_told_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = WHOLE.replace("[desk, lab]", "[other]").replace("anonymous: null", "anonymous: none")
    assert [line.partition(":")[0] for line in problems(tmp_path, text)] == ["18", "28"]
    text = WHOLE.replace("outside: refuse", "outside: x").replace("enforce: false", "enforce: x")
    assert [line.partition(":")[0] for line in problems(tmp_path, text)] == ["10", "15"]


def test_key_stands_once_however_it_is_written(tmp_path: Path) -> None:
    twice = WHOLE.replace(f'["{OTHER}"]', f'["{OTHER}", {{hash: "{OTHER}"}}]')
    assert problems(tmp_path, twice) == [f"27: gateway.secrets: duplicate {OTHER}"]


def test_header_needs_a_gateway(tmp_path: Path) -> None:
    text = "policies: {p: {}}\ntenants:\n  a:\n    policies: [p]\n    header: a\n"
    assert problems(tmp_path, text) == [
        "5: tenants.a.header: a header is trusted only with a gateway's secret"
    ]


def test_two_tenants_share_neither_a_key_nor_a_header(tmp_path: Path) -> None:
    tenants = "".join(
        f"  {name}:\n    policies: [desk]\n    keys: [{KEY}]\n    header: same\n" for name in "bc"
    )
    text = WHOLE.replace("  shop:\n", tenants + "  shop:\n")
    told = problems(tmp_path, text)
    assert told == [
        "23: tenants.b.keys.0: is the key of Acme-1 already",
        "27: tenants.c.keys.0: is the key of Acme-1 already",
        "28: tenants.c.header: names b already",
    ]


def test_file_that_lets_nobody_call_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "policies: {p: {}}\n") == [
        "1: anonymous: without tenants nobody could call: name a policy"
    ]


@pytest.mark.parametrize("text", ["", "[]", "5", "policies", "policies: []", "policies: {}"])
def test_file_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text)
