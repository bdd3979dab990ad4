"""Holds the computed decisions to the server's own, on real requests."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from models.controls import Controls, Rule
from models.decision import refused_category
from training.client import RejectedError, Reply, Scores, Settings
from training.data.rows import Row
from training.evaluation.asking import Ask, Asker
from training.evaluation.report import RuleName
from training.evaluation.statistics import Estimate, counted, missing

CHECKS = 64
RULES: dict[RuleName, Rule] = {"greedy": Rule.GREEDY, "sample": Rule.SAMPLE, "paper": Rule.PAPER}
SHADOW = "the policy is in shadow mode: it answers every request"


class Checks(NamedTuple):
    """Shares of real requests that were decided as expected.

    Attributes:
        chat: Without dials, against the decision of the score route.
        dialled: With a random bias, against the computed decision.
        rules: By rule, every bias 0, against the computed decision.
    """

    chat: Estimate
    dialled: Estimate
    rules: dict[RuleName, Estimate]


async def check(
    asker: Asker,
    rows: Sequence[Row],
    scores: Sequence[Scores],
    seeds: Sequence[int],
    *,
    enforced: bool,
    seed: int,
) -> Checks:
    """Sends requests of one token each for some prompts.

    Args:
        seeds: `[n]` of the requests under the rule `sample`.
        enforced: Whether the policy refuses at all.
    """
    if not enforced:
        return Checks(missing(SHADOW), missing(SHADOW), dict.fromkeys(RULES, missing(SHADOW)))
    rng = random.Random(seed)
    places = sorted(rng.sample(range(len(rows)), min(CHECKS, len(rows))))
    zeros = {name: {"bias": 0.0} for name in asker.names}

    def ask(place: int, dials: Any, rule: RuleName | None = None) -> Ask:
        warm = float(rule == "sample")
        return Ask(rows[place], Settings(dials, rule, warm, seeds[place], 1))

    def bias(column: int) -> float:
        return -scores[rng.randrange(len(scores))].margins[column] + rng.uniform(-1, 1)

    async def as_computed(what: str, rule: RuleName, asked: list[Ask]) -> Estimate:
        try:
            replies = await asker.replies(asked, what)
        except RejectedError as error:  # a policy may reject dials and rules
            return missing(error.message)
        same = [
            reply.category == _computed(reply, scores[place], rule, asker.names, seeds[place])
            for place, reply in zip(places, replies, strict=True)
        ]
        return counted(sum(same), len(same), "")

    plain = await asker.replies([ask(place, {}) for place in places], "check: as served")
    same = [reply.category == scores[at].category for at, reply in zip(places, plain, strict=True)]
    columns = [rng.randrange(len(asker.names)) for _ in places]
    dialled = [
        ask(place, {asker.names[column]: {"bias": bias(column)}})
        for place, column in zip(places, columns, strict=True)
    ]
    return Checks(
        counted(sum(same), len(same), ""),
        await as_computed("check: with dials", "greedy", dialled),
        {
            rule: await as_computed(f"check: {rule}", rule, [ask(at, zeros, rule) for at in places])
            for rule in RULES
        },
    )


def _computed(
    reply: Reply, score: Scores, rule: RuleName, names: Sequence[str], seed: int
) -> str | None:
    """Returns the decision that the score route's margins give under the biases of the reply."""
    applied = Rule.GREEDY if reply.replaced_rule else RULES[rule]
    biases = tuple(reply.biases[name] for name in names)
    controls = Controls(applied, biases, (True,) * len(names))
    column = refused_category(score.log_normaliser, score.margins, controls, 1.0, seed)
    return None if column is None else names[column]
