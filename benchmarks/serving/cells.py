"""What is measured: contenders, and the loads that they meet."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

Body = dict[str, Any]
Fields = Callable[[random.Random], Body]
ServerName = Literal["stock", "rheostat", "naive", "guard", "small pages", "other"]

AT_ONCE = (1, 8, 32, 128)
TOKENS = (1, 16, 128)
FLOOR_BIAS = -15.0


@dataclass(frozen=True)
class Load:
    """What one round sends.

    Attributes:
        tokens: Of an answer, the control token not counted.
        requests: In a round.
        system: Opens every conversation.
    """

    at_once: int
    tokens: int
    stream: bool
    requests: int
    system: str | None = None

    @property
    def name(self) -> str:
        """Its name in tables."""
        kind = "streamed" if self.stream else "plain"
        return f"{kind}, {self.tokens} tokens, {self.at_once} at a time"

    def with_more(self, tokens: int) -> "Load":
        """Returns the load with so many tokens more."""
        return replace(self, tokens=self.tokens + tokens)


@dataclass(frozen=True)
class Contender:
    """Who is measured.

    Attributes:
        server: Which process answers.
        fields: What its requests' bodies hold, drawn anew for each.
        more_tokens: What its answers need beside the tokens that the client sees.
        tenant: Whether its requests come from the tenant with floors.
        guard: When the guard is asked, if one is.
    """

    name: str
    server: ServerName
    fields: Fields
    more_tokens: int = 0
    tenant: bool = False
    guard: Literal["sequence", "parallel"] | None = None


@dataclass(frozen=True)
class Cell:
    """One row of a table.

    Attributes:
        group: The table.
        contenders: The first one is what the others are compared with.
    """

    group: str
    name: str
    load: Load
    contenders: tuple[Contender, ...]


def load(at_once: int, tokens: int, *, stream: bool, round_s: float) -> Load:
    """Returns a load whose rounds last about so long on two cores with the demo checkpoint.

    Its requests are a multiple of ``at_once``.
    """
    # Fitted to stock vLLM: a step, and what a request costs beside its steps.
    step_s = 0.0018 + 0.00012 * at_once
    request_s = step_s * (tokens + 1) / at_once + 0.0015
    waves = max(1, round(round_s / request_s / at_once))
    least = 4 if at_once == 1 else at_once
    return Load(at_once, tokens, stream, max(least, waves * at_once))


def dials(names: tuple[str, ...]) -> Fields:
    """Returns dials that differ from request to request, and under which all is answered."""

    def drawn(rng: random.Random) -> Body:
        return {
            "refusal": {"categories": {name: {"bias": rng.uniform(-40, -20)} for name in names}}
        }

    return drawn


def contenders(
    names: tuple[str, ...], control_ids: tuple[int, ...], respond: str
) -> dict[str, Contender]:
    """Returns all contenders by name.

    Args:
        names: The checkpoint's categories.
        control_ids: Of its control tokens, the respond token last.
        respond: The respond token.
    """
    own = dials(names)
    grammar: Body = {"structured_outputs": {"regex": "[a-z ]{200}"}}
    forced: Body = {"chat_template_kwargs": {"control": respond}}
    same_rates: Body = {"categories": {name: {"rate": 0.5} for name in names[:2]}}
    everything = [
        Contender("stock", "stock", lambda rng: {}, more_tokens=1),
        Contender("dials", "rheostat", own),
        Contender("report", "rheostat", lambda rng: _with(own(rng), report=True)),
        Contender("refused", "rheostat", lambda rng: _refused(names, rng)),
        Contender("rates, all equal", "rheostat", lambda rng: {"refusal": same_rates}),
        Contender("rates, all different", "rheostat", lambda rng: _rates(names, rng)),
        Contender("floors", "rheostat", own, tenant=True),
        Contender("no field", "rheostat", lambda rng: {}),
        Contender("stock, grammar", "stock", lambda rng: grammar | forced),
        Contender("dials, grammar", "rheostat", lambda rng: own(rng) | grammar),
        Contender("logit_bias", "stock", lambda rng: _biased(control_ids, rng), more_tokens=1),
        Contender("naive processor", "naive", lambda rng: _naive(names, rng), more_tokens=1),
        Contender("guard in sequence", "stock", lambda rng: {}, guard="sequence"),
        Contender("guard in parallel", "stock", lambda rng: {}, guard="parallel"),
        Contender("no huge pages", "small pages", own),
        Contender("other checkout", "other", own),
        Contender("other checkout, report", "other", lambda rng: _with(own(rng), report=True)),
    ]
    return {contender.name: contender for contender in everything}


def _with(body: Body, **options: object) -> Body:
    return {"refusal": body["refusal"] | options}


def _refused(names: tuple[str, ...], rng: random.Random) -> Body:
    return {"refusal": {"categories": {name: {"bias": rng.uniform(40, 60)} for name in names}}}


def _rates(names: tuple[str, ...], rng: random.Random) -> Body:
    return {
        "refusal": {"categories": {name: {"rate": rng.uniform(0.2, 0.8)} for name in names[:2]}}
    }


def _biased(control_ids: tuple[int, ...], rng: random.Random) -> Body:
    return {"logit_bias": {str(token): rng.uniform(-40, -20) for token in control_ids[:-1]}}


def _naive(names: tuple[str, ...], rng: random.Random) -> Body:
    return {"vllm_xargs": {name: rng.uniform(-40, -20) for name in names}}


def grid(
    known: dict[str, Contender],
    round_s: float,
    others: tuple[str, ...] = (),
    at_onces: tuple[int, ...] = AT_ONCE,
    lengths: tuple[int, ...] = TOKENS,
) -> list[Cell]:
    """Returns dials against stock at every load.

    Args:
        known: By name.
        round_s: About how long a round lasts.
        others: More contenders.
        at_onces: How many requests at a time.
        lengths: How many tokens an answer has.
    """
    pair = tuple(known[name] for name in ("stock", "dials", *others))
    return [
        Cell("grid", at.name, at, pair)
        for stream in (False, True)
        for tokens in lengths
        for at_once in at_onces
        for at in [load(at_once, tokens, stream=stream, round_s=round_s)]
    ]


def features(known: dict[str, Contender], round_s: float, system: str) -> list[Cell]:
    """Returns what the server can do, against stock at two loads."""
    plain = [
        ("stock", "dials", "no field", "report", "refused", "floors"),
        ("stock", "rates, all equal", "rates, all different"),
        ("stock, grammar", "dials, grammar"),
    ]
    cells = []
    for at_once, tokens, stream in ((32, 16, False), (1, 16, True)):
        at = load(at_once, tokens, stream=stream, round_s=round_s)
        cells += [Cell("features", at.name, at, _named(known, row)) for row in plain]
        long = Load(at_once, tokens, stream, at.requests, system)
        name = f"{long.name}, long system prompt"
        cells.append(Cell("features", name, long, _named(known, ("stock", "dials"))))
    return cells


def peers(known: dict[str, Contender], round_s: float) -> list[Cell]:
    """Returns what people use instead, against this server."""
    row: tuple[str, ...] = ("dials", "stock", "logit_bias", "naive processor")
    row += ("guard in sequence", "guard in parallel", "no huge pages")
    loads = [
        load(at_once, tokens, stream=stream, round_s=round_s)
        for at_once, tokens, stream in ((32, 16, False), (1, 1, False), (1, 16, True))
    ]
    return [Cell("peers", at.name, at, _named(known, row)) for at in loads]


def cost(known: dict[str, Contender], round_s: float, *, other: bool) -> list[Cell]:
    """Returns what one change costs: two loads, and the other checkout where there is one."""
    row: tuple[str, ...] = ("stock", "dials", "report")
    if other:
        row += ("other checkout", "other checkout, report")
    loads = [
        load(at_once, tokens, stream=False, round_s=round_s)
        for at_once, tokens in ((32, 16), (1, 1))
    ]
    return [Cell("cost", at.name, at, _named(known, row)) for at in loads]


def _named(known: dict[str, Contender], row: tuple[str, ...]) -> tuple[Contender, ...]:
    return tuple(known[name] for name in row)
