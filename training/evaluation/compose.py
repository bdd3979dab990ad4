"""Computes the report from what the server answered."""

import hashlib
import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from training.client import Policy, Scores, Served, SolvedRate
from training.evaluation.checks import RULES, Checks
from training.evaluation.decisions import Indices, Observed, controls, decisions, set_reports
from training.evaluation.dials import (
    as_json,
    cross_talk,
    decided_by_rule,
    rates,
    rules,
    sweeps,
    tokens,
)
from training.evaluation.questions import Prompts, Questions, described, fingerprint
from training.evaluation.report import (
    About,
    Agreement,
    Record,
    Report,
    RuleName,
    ServedCalibration,
    ServedPolicy,
    Texts,
)
from training.evaluation.robustness import robustness
from training.evaluation.statistics import Estimate, share
from training.judging.report import Readings

PACKAGES = ("rheostat", "numpy", "scipy", "scikit-learn", "torch")


class Facts(NamedTuple):
    """What the server says of itself.

    Attributes:
        calibration: All that it tells of it; None: it has none.
    """

    server: str
    model: str
    served: Served
    policy: Policy
    calibration: Any


class Answers(NamedTuple):
    """What was asked of the server.

    Attributes:
        scores: `[n]`, of the prompts as they are.
        variants: By way of asking, the scores; or why the server gave none.
        solved: By category, the solution of each rate; or why there is none.
    """

    scores: list[Scores]
    variants: dict[str, list[Scores] | str]
    solved: dict[str, list[SolvedRate]] | str
    checks: Checks


def sample_seed(fingerprinted: str) -> int:
    """Returns the seed of a prompt's requests under the rule `sample`."""
    return int(fingerprinted[:8], 16)


def compose(
    prompts: Prompts,
    questions: Questions,
    facts: Facts,
    answers: Answers,
    texts: Texts,
    readings: Readings,
    command: str,
    seconds: float,
) -> Report:
    """Returns the report."""
    hashed = [fingerprint(row) for row in prompts.rows]
    names, seed = facts.served.names, questions.seed
    observed = _observed(prompts, names, answers.scores)
    served = [facts.policy.biases[name] for name in names]
    asked = {name: _decided(scores, names) for name, scores in answers.variants.items()}
    return Report(
        about=_about(prompts, questions, facts, command, seconds),
        categories=list(names),
        sets=set_reports(observed, seed),
        sweeps=sweeps(observed, served),
        rates=rates(observed, answers.solved, seed),
        cross_talk=cross_talk(observed, served),
        tokens=tokens(observed, seed),
        rules=rules(
            observed,
            decided_by_rule(observed, [sample_seed(one) for one in hashed]),
            answers.checks.rules,
        ),
        robustness=robustness(observed, asked),
        texts=texts,
        readers=readings,
        agreement=Agreement(
            scored=_scored_agreement(observed, served, facts.policy, answers),
            chat=answers.checks.chat,
            dialled=answers.checks.dialled,
        ),
        records=[
            Record(
                sha256=one,
                set=name,
                category=row.category,
                decided=score.category,
                margins=list(score.margins),
            )
            for one, name, row, score in zip(
                hashed, prompts.sets, prompts.rows, answers.scores, strict=True
            )
        ],
    )


def _observed(prompts: Prompts, names: Sequence[str], scores: Sequence[Scores]) -> Observed:
    column: dict[str | None, int] = {None: len(names), **{n: at for at, n in enumerate(names)}}
    return Observed(
        names=tuple(names),
        sets=np.array(prompts.sets),
        truth=np.array([column[row.category] for row in prompts.rows]),
        near_miss=np.array([row.near_miss is not None for row in prompts.rows]),
        margins=np.array([score.margins for score in scores], dtype=np.float32),
        log_normaliser=np.array([score.log_normaliser for score in scores], dtype=np.float32),
        decided=_columns(scores, names),
    )


def _columns(scores: Sequence[Scores], names: Sequence[str]) -> Indices:
    column: dict[str | None, int] = {None: len(names), **{n: at for at, n in enumerate(names)}}
    return np.array([column[score.category] for score in scores])


def _decided(scores: list[Scores] | str, names: Sequence[str]) -> Indices | str:
    return scores if isinstance(scores, str) else _columns(scores, names)


def _scored_agreement(
    observed: Observed, served: Sequence[float], policy: Policy, answers: Answers
) -> Estimate:
    rule = RULES[_rule(policy)]
    scores = [answers.scores, *(s for s in answers.variants.values() if not isinstance(s, str))]
    same = []
    for some in scores:
        margins = np.array([score.margins for score in some], dtype=np.float32)
        normaliser = np.array([score.log_normaliser for score in some], dtype=np.float32)
        told = Observed(
            observed.names,
            observed.sets,
            observed.truth,
            observed.near_miss,
            margins,
            normaliser,
            _columns(some, observed.names),
        )
        same.append(decisions(told, controls(served, rule)) == told.decided)
    return share(np.concatenate(same), "")


def _about(
    prompts: Prompts, questions: Questions, facts: Facts, command: str, seconds: float
) -> About:
    policy, calibration = facts.policy, facts.calibration
    return About(
        created=datetime.now(UTC),
        command=command,
        seconds=round(seconds, 1),
        server=facts.server,
        model=facts.model,
        hashes=facts.served.hashes,
        policy=ServedPolicy(
            name=policy.name,
            sha256=_digest(policy.told),
            decision=_rule(policy),
            enforce=policy.enforce,
            biases={name: as_json(bias) for name, bias in policy.biases.items()},
        ),
        calibration=None
        if calibration is None
        else ServedCalibration(name=calibration["name"], sha256=_digest(calibration)),
        data=described(questions, prompts),
        limit=questions.limit,
        seed=questions.seed,
        versions={"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    )


def _rule(policy: Policy) -> RuleName:
    return next(name for name in RULES if name == policy.decision)


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
