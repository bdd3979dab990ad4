"""The policy file: its schema, and every check that needs no checkpoint."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
)

from models.manifest import Name
from server.dials.protocol import HEADER, POLICY_HEADER, Dial, DialOptions, RefusalIn
from server.policies.credentials import KeyEntry, StoredKey
from server.policies.source import FieldPath, Problem, Source

GENERATED = "generated"
TEMPLATE = "template"
# These headers have another meaning, or client libraries set them.
_TAKEN = {HEADER, POLICY_HEADER, "authorization", "x-api-key", "content-type", "content-length"}
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise ValueError(f"duplicate {repeated[0]}")
    return values


def _distinct_keys(keys: tuple[StoredKey, ...]) -> tuple[StoredKey, ...]:
    _distinct(tuple(key.hash for key in keys))
    return keys


def _free_header(name: str) -> str:
    if not _HEADER_NAME.fullmatch(name) or name.lower() in _TAKEN:
        raise ValueError(f"{name!r} cannot be the name of this header")
    return name.lower()


def _texts(value: Any) -> Any:
    texts = list(value.values()) if isinstance(value, dict) else [value]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f"must be {GENERATED}, {TEMPLATE} or a text, or one of them for each category"
        )
    return value


TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
HeaderName = Annotated[str, AfterValidator(_free_header)]
HeaderValue = Annotated[str, StringConstraints(pattern=r"^[!-~]([ -~]{0,126}[!-~])?$")]
Most = Annotated[int, Field(ge=1, strict=True)]
Keys = Annotated[tuple[KeyEntry, ...], AfterValidator(_distinct_keys)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicyEntry(_Strict):
    """One policy as the operator writes it.

    Attributes:
        defaults: The dials of requests that set none.
        floors: The least dial that a request may set, by category.
        ceilings: The greatest dial that a request may set, by category.
        outside: ``clamp`` moves a dial beyond a bound to the bound and reports it, ``refuse``
            answers 403.
        refusal_text: ``generated`` by the model, ``template`` for the checkpoint's own text, or a
            text; for all categories or for each.
        enforce: Whether decisions are followed; otherwise they are only counted and reported.
        raw_prompts: Whether prompts may bypass the chat template. Like ``prefill``, ``report`` and
            ``grammars``, None allows it if no category has a floor.
        prefill: Whether requests may begin the assistant's answer: no decision reads that text.
        control_text: Control tokens in a client's text become ``plain`` text, or ``refuse`` the
            request.
        report: Whether requests may ask for a report, which shows margins.
        grammars: Whether requests may bring a grammar, which can dictate the assistant's answer
            and slows the engine.
        refusal_in: The fields of a chat message that hold a refusal's text, for every request;
            None lets requests choose.
    """

    defaults: DialOptions = Field(default_factory=DialOptions)
    floors: dict[Name, Dial] = {}
    ceilings: dict[Name, Dial] = {}
    outside: Literal["clamp", "refuse"] = "clamp"
    refusal_text: Annotated[str | dict[str, str], BeforeValidator(_texts)] = GENERATED
    enforce: StrictBool = True
    raw_prompts: StrictBool | None = None
    prefill: StrictBool | None = None
    control_text: Literal["plain", "refuse"] = "plain"
    report: StrictBool | None = None
    grammars: StrictBool | None = None
    refusal_in: RefusalIn | None = None

    def refusal_text_of(self, category: str) -> str:
        """Returns a category's ``generated``, ``template`` or text."""
        if isinstance(self.refusal_text, str):
            return self.refusal_text
        return self.refusal_text.get(category, GENERATED)


class TenantEntry(_Strict):
    """One tenant.

    Attributes:
        policies: The policies that it may choose; the first is its default.
        keys: Hashes of its API keys, with their expiry.
        header: Its name in the gateway's tenant header.
        max_running: How many of its answers may be under way at once.
    """

    policies: Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(_distinct)]
    keys: Keys = ()
    header: HeaderValue | None = None
    max_running: Most | None = None


class GatewayEntry(_Strict):
    """A gateway that has authenticated the tenant already.

    Attributes:
        tenant_header: The header that names the tenant.
        secret_header: The header that proves that the gateway wrote the name.
        secrets: Hashes of that header's values; they may expire like keys.
    """

    tenant_header: HeaderName
    secret_header: HeaderName
    secrets: Annotated[tuple[KeyEntry, ...], Field(min_length=1), AfterValidator(_distinct_keys)]


class PolicyFile(_Strict):
    """The whole file.

    Attributes:
        version: Of this format.
        policies: By name.
        tenants: By name.
        gateway: None trusts no header.
        anonymous: The policy of callers who are no tenant; None answers them 401.
        anonymous_max_running: How many of their answers may be under way at once, together.
    """

    version: Literal[1] = 1
    policies: Annotated[dict[Name, PolicyEntry], Field(min_length=1)]
    tenants: dict[TenantName, TenantEntry] = {}
    gateway: GatewayEntry | None = None
    anonymous: Name | None = None
    anonymous_max_running: Most | None = None


class ReadPolicies(NamedTuple):
    """A valid file, and its source for the lines of later problems."""

    file: PolicyFile
    source: Source


def read_policy_file(path: Path) -> ReadPolicies:
    """Reads and validates a policy file, as far as that needs no checkpoint.

    Raises:
        FileError: With every problem and its line.
    """
    source = Source(path)
    try:
        file = PolicyFile.model_validate(source.value)
    except ValidationError as error:
        problems = [_problem(details) for details in error.errors(include_url=False)]
        raise source.error(problems) from error
    if found := list(_contradictions(file)):
        raise source.error(found)
    return ReadPolicies(file, source)


def _problem(details: Any) -> Problem:
    path: FieldPath = tuple(part for part in details["loc"] if part != "[key]")
    if details["type"] == "extra_forbidden":
        return Problem(path, f"unknown field; known here are {', '.join(_known(path[:-1]))}")
    if details["type"] == "model_type":
        return Problem(path, "must be a mapping of fields to values")
    return Problem(path, details["msg"].removeprefix("Value error, "))


def _known(path: FieldPath) -> list[str]:
    """Returns the fields that are valid at a path of the file."""
    if path[-1:] == ("defaults",):
        return list(DialOptions.model_fields)
    if isinstance(path[-1] if path else "", int):
        return list(StoredKey.model_fields)
    places: dict[str | int, type[BaseModel]] = {
        "policies": PolicyEntry,
        "tenants": TenantEntry,
        "gateway": GatewayEntry,
    }
    return list((places[path[0]] if path else PolicyFile).model_fields)


def _contradictions(file: PolicyFile) -> Iterator[Problem]:
    yield from _unknown_policies(file)
    yield from _shared_credentials(file)
    for name, tenant in file.tenants.items():
        if not tenant.keys and tenant.header is None:
            yield Problem(("tenants", name), "needs keys, or a header that its gateway sends")
        if tenant.header is not None and file.gateway is None:
            yield Problem(
                ("tenants", name, "header"), "a header is trusted only with a gateway's secret"
            )
    if file.gateway and file.gateway.tenant_header == file.gateway.secret_header:
        yield Problem(("gateway", "secret_header"), "must be another header than tenant_header")
    if not file.tenants and file.anonymous is None:
        yield Problem(("anonymous",), "without tenants nobody could call: name a policy")
    if file.anonymous is None and file.anonymous_max_running is not None:
        yield Problem(("anonymous_max_running",), "without `anonymous` such callers are 401")
    for name, policy in file.policies.items():
        for problem in _policy_contradictions(policy):
            yield Problem(("policies", name, *problem.path), problem.message)


def _unknown_policies(file: PolicyFile) -> Iterator[Problem]:
    known = ", ".join(file.policies)
    named: list[tuple[FieldPath, str]] = [
        (("tenants", tenant, "policies", place), policy)
        for tenant, entry in file.tenants.items()
        for place, policy in enumerate(entry.policies)
    ]
    if file.anonymous is not None:
        named.append((("anonymous",), file.anonymous))
    for path, policy in named:
        if policy not in file.policies:
            yield Problem(path, f"no policy is named {policy!r}; there are {known}")


def _shared_credentials(file: PolicyFile) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    if file.gateway:
        owners = {secret.hash: "the gateway" for secret in file.gateway.secrets}
    for name, tenant in file.tenants.items():
        for place, key in enumerate(tenant.keys):
            if owners.setdefault(key.hash, name) != name:
                path: FieldPath = ("tenants", name, "keys", place)
                yield Problem(path, f"is the key of {owners[key.hash]} already")
    headers: dict[str, str] = {}
    for name, tenant in file.tenants.items():
        if tenant.header is not None and headers.setdefault(tenant.header, name) != name:
            yield Problem(("tenants", name, "header"), f"names {headers[tenant.header]} already")


def _policy_contradictions(policy: PolicyEntry) -> Iterator[Problem]:
    if policy.floors and policy.defaults.decision not in (None, "greedy"):
        yield Problem(
            ("defaults", "decision"),
            "a policy with floors decides by greedy: other rules may answer what a floor refuses",
        )
    if policy.refusal_in and policy.defaults.refusal_in not in (None, policy.refusal_in):
        yield Problem(("defaults", "refusal_in"), "differs from the policy's own refusal_in")
    for category in policy.floors.keys() & policy.ceilings.keys():
        floor, ceiling = policy.floors[category].bias, policy.ceilings[category].bias
        if floor is not None and ceiling is not None and floor > ceiling:
            yield Problem(("floors", category), "lies above the category's ceiling")
