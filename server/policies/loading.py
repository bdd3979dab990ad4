"""From the policy file to the policies of one served checkpoint."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from models.errors import ConfigError, RequestError
from models.manifest import Manifest
from models.solver import Target
from server.dials.board import DialBoard
from server.dials.calibrations import DEFAULT_CALIBRATION, Calibrations, Question
from server.dials.floors import Bounds, Side
from server.dials.protocol import FIELD, DialOptions
from server.policies.book import ActivePolicy, Caller, PolicyBook
from server.policies.file import GENERATED, TEMPLATE, PolicyEntry, PolicyFile, read_policy_file
from server.policies.source import FieldPath, Problem


class Served(NamedTuple):
    """What policies need of the served checkpoint."""

    manifest: Manifest
    calibrations: Calibrations


class _WrongPolicyError(ConfigError):
    """Carries the problems of one policy, whose lines only the file knows."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


def load_policies(path: Path, served: Served) -> PolicyBook:
    """Reads a policy file and resolves its policies on a checkpoint.

    Raises:
        FileError: With every problem and its line.
    """
    file, source = read_policy_file(path)
    policies: dict[str, ActivePolicy] = {}
    problems: list[Problem] = []
    for name, entry in file.policies.items():
        try:
            policies[name] = _policy(name, entry, served)
        except _WrongPolicyError as error:
            problems += [
                Problem(("policies", name, *problem.path), problem.message)
                for problem in error.problems
            ]
    if problems:
        raise source.error(problems)
    return _book(file, policies)


def default_policies(
    defaults: DialOptions, served: Served, api_keys: tuple[str, ...] = ()
) -> PolicyBook:
    """Returns the one policy of a server without a policy file.

    Raises:
        ConfigError: The defaults cannot be met.
    """
    try:
        board = DialBoard(served.manifest, defaults, served.calibrations)
    except RequestError as error:
        raise ConfigError(f"RHEOSTAT_DEFAULTS: {error.message}") from error
    return PolicyBook.for_everybody(board, api_keys)


def _book(file: PolicyFile, policies: Mapping[str, ActivePolicy]) -> PolicyBook:
    callers = {
        name: Caller(
            name, tuple(policies[policy] for policy in tenant.policies), tenant.max_running
        )
        for name, tenant in file.tenants.items()
    }
    return PolicyBook(
        policies,
        {
            key.hash: (key, callers[name])
            for name, tenant in file.tenants.items()
            for key in tenant.keys
        },
        Caller(None, (policies[file.anonymous],), file.anonymous_max_running)
        if file.anonymous
        else None,
        file.gateway,
        {t.header: callers[name] for name, t in file.tenants.items() if t.header is not None},
    )


def _policy(name: str, entry: PolicyEntry, served: Served) -> ActivePolicy:
    names = served.manifest.names
    if unknown := list(_unknown_categories(entry, names)):
        raise _WrongPolicyError(unknown)
    bounds = _bounds(entry, served)
    try:
        board = DialBoard(served.manifest, entry.defaults, served.calibrations, bounds)
    except RequestError as error:
        path = tuple((error.param or FIELD).split(".")[1:])
        raise _WrongPolicyError([Problem(("defaults", *path), _without_path(error))]) from error
    outside: list[Problem] = [
        Problem(("defaults", "categories", category), f"lies beyond the policy's {side}")
        for category, side in board.unasked.clamped
        if category in entry.defaults.categories
    ]
    if outside:
        raise _WrongPolicyError(outside)
    # Raw prompts and prefilled text are not judged, and margins find the wordings that pass.
    unguarded = not bounds.has_floor
    report = unguarded if entry.report is None else entry.report
    if entry.defaults.report and not report:
        problem = "reports are off in this policy; with a floor, they need report: true beside it"
        raise _WrongPolicyError([Problem(("defaults", "report"), problem)])
    return ActivePolicy(
        name,
        board,
        _refusal_texts(entry, served.manifest),
        entry.enforce,
        raw_prompts=unguarded if entry.raw_prompts is None else entry.raw_prompts,
        prefill=unguarded if entry.prefill is None else entry.prefill,
        control_text=entry.control_text,
        report=report,
        grammars=unguarded if entry.grammars is None else entry.grammars,
        refusal_in=entry.refusal_in,
    )


def _without_path(error: RequestError) -> str:
    # The file's path stands in front already; the error's own is a request's.
    return error.message.removeprefix(f"{error.param}: ")


def _unknown_categories(entry: PolicyEntry, names: list[str]) -> Iterator[Problem]:
    texts = entry.refusal_text if isinstance(entry.refusal_text, dict) else {}
    fields: tuple[tuple[FieldPath, Mapping[str, object]], ...] = (
        (("defaults", "categories"), entry.defaults.categories),
        (("floors",), entry.floors),
        (("ceilings",), entry.ceilings),
        (("refusal_text",), texts),
    )
    for path, by_category in fields:
        for category in by_category:
            if category not in names:
                known = ", ".join(names)
                yield Problem(
                    (*path, category), f"this checkpoint has no such category; it has {known}"
                )


def _refusal_texts(entry: PolicyEntry, manifest: Manifest) -> tuple[str | None, ...]:
    written = [(c, entry.refusal_text_of(c.name)) for c in manifest.categories]
    return tuple(
        category.refusal_text if text == TEMPLATE else None if text == GENERATED else text
        for category, text in written
    )


def _bounds(entry: PolicyEntry, served: Served) -> Bounds:
    problems: list[Problem] = []
    sides: dict[Side, tuple[float, ...]] = {}
    fields: tuple[tuple[Side, Mapping[str, Target]], ...] = (
        ("floor", entry.floors),
        ("ceiling", entry.ceilings),
    )
    for side, written in fields:
        biases = []
        for name in served.manifest.names:
            try:
                biases.append(_bound(entry, name, side, written.get(name), served))
            except RequestError as error:
                problems.append(Problem((f"{side}s", name), _without_path(error)))
        sides[side] = tuple(biases)
    if problems:
        raise _WrongPolicyError(problems)
    crossed = [
        Problem(("floors", name), f"a bias of {floor:.6g} lies above the ceiling, {ceiling:.6g}")
        for name, floor, ceiling in zip(
            served.manifest.names, sides["floor"], sides["ceiling"], strict=True
        )
        if floor > ceiling
    ]
    if crossed:
        raise _WrongPolicyError(crossed)
    written_bounds = [*entry.floors.values(), *entry.ceilings.values()]
    return Bounds(
        sides["floor"],
        sides["ceiling"],
        refuses=entry.outside == "refuse",
        calibrated=any(target.bias is None for target in written_bounds),
    )


def _bound(
    entry: PolicyEntry, name: str, side: Side, target: Target | None, served: Served
) -> float:
    """Returns one bound's bias; a rate is that of the category's own dial, all others at never.

    Under greedy other dials can only add refusals, so a floor's rate holds whatever they are.

    Raises:
        RequestError: There is no calibration, or it cannot meet the bound.
    """
    if target is None:
        return -math.inf if side == "floor" else math.inf
    if target.bias is not None:
        return target.bias
    calibrations = served.calibrations
    calibration = entry.defaults.calibration or DEFAULT_CALIBRATION
    param = f"{FIELD}.calibration"
    calibrations.require(calibration, param=param)
    if target.rate is not None:
        # To the next whole prompt, so that rounding is never to the operator's disadvantage.
        n = calibrations.prompts(calibration, name)
        whole = math.ceil if side == "floor" else math.floor
        target = Target(rate=whole(round(target.rate * n, 6)) / n)
    bias = calibrations.bias_alone(calibration, name, target, param=param)
    if target.rate is not None:
        _check_reached(calibration, name, side, target.rate, bias, served)
    return bias


def _check_reached(
    calibration: str, name: str, side: Side, rate: float, bias: float, served: Served
) -> None:
    names = served.manifest.names
    alone = tuple(Target(bias=bias if other == name else -math.inf) for other in names)
    solution = served.calibrations.solve(Question(calibration, alone, None))
    reached = solution.expected[names.index(name)].rate
    if reached < rate if side == "floor" else reached > rate:
        raise RequestError(
            f"prompts with equal margins cannot be told apart: beside {rate:.4g} only a rate of "
            f"{reached:.4g} can be reached on the calibration {calibration!r}"
        )
