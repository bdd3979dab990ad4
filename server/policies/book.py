"""Policies in force: who is calling, what they may choose from, and between which bounds."""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from starlette.datastructures import Headers

from models.controls import Controls, Rule, sensitivity_of_bias
from models.errors import ExpiredKeyError, NotAllowedError, UnknownCallerError
from server.context import DEFAULT_POLICY
from server.dials.board import DialBoard, Resolution
from server.dials.protocol import FIELD, RefusalOptions
from server.policies.credentials import StoredKey, hash_key, now, presented_keys
from server.policies.file import GENERATED, GatewayEntry


@dataclass(frozen=True)
class ActivePolicy:
    """One policy of a served checkpoint.

    Attributes:
        name: As in the file.
        board: Its dials; whatever a request asks for ends between its floors and ceilings.
        refusal_texts: What a refusal says, by category in manifest order; none: generated.
        enforce: Whether decisions are followed (else they are only made and told).
        raw_prompts: Whether prompts may be sent past the chat template.
        prefill: Whether requests may begin the assistant's answer themselves.
        control_text: What becomes of control tokens in a client's text.
        report: Whether requests may ask for a report.
        grammars: Whether requests may ask for text that follows a grammar.
    """

    name: str
    board: DialBoard
    refusal_texts: tuple[str | None, ...] = ()
    enforce: bool = True
    raw_prompts: bool = True
    prefill: bool = True
    control_text: Literal["plain", "refuse"] = "plain"
    report: bool = True
    grammars: bool = True

    def reports(self, options: RefusalOptions) -> bool:
        """Returns whether a request gets a report.

        Raises:
            NotAllowedError: It asks for one and may not.
        """
        if options.report and not self.report:
            raise NotAllowedError(
                f"{FIELD}.report: the policy allows no reports", param=f"{FIELD}.report"
            )
        return self.board.reports(options)

    def check_raw_prompts(self) -> None:
        """Raises a NotAllowedError where prompts may not be sent past the chat template."""
        if not self.raw_prompts:
            raise NotAllowedError("the policy allows no raw prompts: send messages", param="prompt")

    def describe(self) -> dict[str, Any]:
        """Returns what a tenant may know of a policy of its own, as JSON."""
        bounds, unasked = self.board.bounds, self.board.unasked.controls
        texts = self.refusal_texts or (None,) * len(self.board.names)
        rows = zip(
            self.board.names, unasked.bias, bounds.floors, bounds.ceilings, texts, strict=True
        )
        return {
            "object": "refusal.policy",
            "name": self.name,
            "decision": unasked.rule.name.lower(),
            "outside": "refuse" if bounds.refuses else "clamp",
            "enforce": self.enforce,
            "raw_prompts": self.raw_prompts,
            "prefill": self.prefill,
            "control_text": self.control_text,
            "report": self.report,
            "grammars": self.grammars,
            "categories": {
                name: {
                    "default": _dial(bias),
                    "floor": None if floor == -math.inf else _dial(floor),
                    "ceiling": None if ceiling == math.inf else _dial(ceiling),
                    "refusal_text": GENERATED if text is None else text,
                }
                for name, bias, floor, ceiling, text in rows
            },
        }


def _dial(bias: float) -> dict[str, float | str]:
    word = {math.inf: "always", -math.inf: "never"}.get(bias)
    return {"bias": bias if word is None else word, "sensitivity": sensitivity_of_bias(bias)}


@dataclass(frozen=True)
class Caller:
    """Who sends a request. It keeps the policies that it came with, whatever is loaded later.

    Attributes:
        tenant: Its name; none for callers who are no tenant.
        policies: What it may choose from; the first is its default.
    """

    tenant: str | None
    policies: tuple[ActivePolicy, ...]

    def policy(self, name: str | None = None) -> ActivePolicy:
        """Returns the policy that a request follows.

        Args:
            name: The one that it names, if it does.

        Raises:
            NotAllowedError: The caller may not choose it; whether there is such a policy for
                others is not told.
        """
        if name is None:
            return self.policies[0]
        for policy in self.policies:
            if policy.name == name:
                return policy
        own = ", ".join(policy.name for policy in self.policies)
        raise NotAllowedError(
            f"{FIELD}.policy: this caller may choose from {own}, not {reprlib.repr(name)}",
            param=f"{FIELD}.policy",
        )


class CallerSource(Protocol):
    """Knows callers: a book, or what holds the book in force."""

    def caller(self, headers: Headers) -> Caller:
        """Returns who sends a request.

        Raises:
            UnknownCallerError: Nobody that may call.
        """


@dataclass(frozen=True)
class PolicyBook:
    """All policies and callers of one policy file, or of a server without one.

    Attributes:
        policies: By name.
        keys: By the hash of a key, the key and whose it is.
        anonymous: Callers who are no tenant; none: they are refused.
        gateway: Where a header may name the tenant.
        headers: Callers by what the gateway says.
        clock: The time in UTC; keys expire by it.
    """

    policies: Mapping[str, ActivePolicy]
    keys: Mapping[str, tuple[StoredKey, Caller]]
    anonymous: Caller | None
    gateway: GatewayEntry | None = None
    headers: Mapping[str, Caller] | None = None
    clock: Callable[[], datetime] = now

    @classmethod
    def for_everybody(cls, board: DialBoard, api_keys: Sequence[str] = ()) -> "PolicyBook":
        """Returns the book of a server without a policy file.

        Args:
            board: Its defaults, without bounds.
            api_keys: vLLM's; where there are any, callers need one.
        """
        policy = ActivePolicy(DEFAULT_POLICY, board)
        caller = Caller(None, (policy,))
        stored = [StoredKey(hash=hash_key(key)) for key in api_keys]
        keys = {key.hash: (key, caller) for key in stored}
        return cls({policy.name: policy}, keys, None if keys else caller)

    def caller(self, headers: Headers) -> Caller:
        """Returns who sends a request.

        Raises:
            UnknownCallerError: Nobody that may call, two at once, or a tenant that no gateway
                vouches for.
        """
        known = [self._by_key(key) for key in presented_keys(headers)]
        known.append(self._by_gateway(headers))
        callers = {caller.tenant: caller for caller in known if caller is not None}
        if len(callers) > 1:
            raise UnknownCallerError("the request shows credentials of several tenants")
        for caller in callers.values():
            return caller
        if self.anonymous is None:
            raise UnknownCallerError(self._why_unknown(headers))
        return self.anonymous

    def strictest(self) -> Resolution:
        """Returns dials that are below no policy's floor, for what comes from no request."""
        boards = [policy.board for policy in self.policies.values()]
        if not any(board.bounds.has_floor for board in boards):
            return boards[0].unasked
        floors = zip(*(board.bounds.floors for board in boards), strict=True)
        bias = tuple(max(0.0, *column) for column in floors)
        return Resolution(Controls(Rule.GREEDY, bias, (True,) * len(bias)))

    def _by_key(self, key: bytes) -> Caller | None:
        stored, caller = self.keys.get(hash_key(key), (None, None))
        if stored is not None:
            self._check_expiry(stored, "this key")
        return caller

    def _check_expiry(self, stored: StoredKey, what: str) -> None:
        # Only whoever has the key learns of its end: by any other, no stored key is found.
        if stored.expired(self.clock()):
            raise ExpiredKeyError(f"{what} expired at {stored.expires}: ask for a new one")

    def _by_gateway(self, headers: Headers) -> Caller | None:
        if self.gateway is None:
            return None
        named = headers.getlist(self.gateway.tenant_header)
        shown = headers.getlist(self.gateway.secret_header)
        if not named and not shown:
            return None
        secret = hash_key(shown[0].encode("latin-1")) if len(shown) == 1 else ""
        stored = next((one for one in self.gateway.secrets if one.hash == secret), None)
        if len(named) > 1 or stored is None:
            raise UnknownCallerError(
                f"{self.gateway.tenant_header} counts only once, and with the gateway's secret"
            )
        self._check_expiry(stored, f"the secret in {self.gateway.secret_header}")
        return (self.headers or {}).get(named[0]) if named else None

    def _why_unknown(self, headers: Headers) -> str:
        if self.gateway is not None and self.gateway.tenant_header in headers:
            return f"{self.gateway.tenant_header}: this server knows no tenant of that name"
        return "no key that this server knows: send `Authorization: Bearer KEY` or `x-api-key: KEY`"
