"""Which flexible loss a token gets, from the recipe and the share of the training that is done."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from loss.schedule import parameter_at
from training.config.loss import GammaSchedule, LossConfig, QSchedule
from training.config.recipe import RESPOND

Schedule: TypeAlias = QSchedule | GammaSchedule
Setting: TypeAlias = float | Schedule | dict[str, float] | str


class _Parameter(NamedTuple):
    """q or gamma of both kinds of tokens.

    Attributes:
        decision: Number, schedule, or float32 `[controls]` in the order of their ids.
    """

    decision: float | Schedule | Tensor
    text: float | Schedule


class TokenLosses:
    """The losses of decision and text tokens.

    Nothing here waits for a GPU: tables are put on a device once, and a schedule's number of the
    step stays a Python float.

    Args:
        config: What the recipe says. `auto` must have been replaced by numbers.
        control_ids: Ids of the control tokens, for instance `manifest.control_ids`.
        names: Their names in the same order, `respond` for the respond token, for instance
            `[*manifest.names, "respond"]`.

    Raises:
        ValueError: `auto` is left, a name stands for no control token, or ids and names do not
            belong together.
    """

    def __init__(
        self, config: LossConfig, control_ids: Sequence[int], names: Sequence[str]
    ) -> None:
        id_of = _ids_by_name(control_ids, names)
        ids = sorted(id_of.values())
        by_name = {name: ids.index(token_id) for name, token_id in id_of.items()}
        self._ids = torch.tensor(ids)
        self._q = _parameter("q", config.decision.q, config.text.q, by_name)
        self._gamma = _parameter("gamma", config.decision.gamma, config.text.gamma, by_name)
        self._copies: dict[tuple[int, torch.device], Tensor] = {}

    def parameters(self, targets: Tensor, progress: float) -> tuple[float | Tensor, float | Tensor]:
        """Returns q and gamma of each token.

        Args:
            targets: Token ids, any shape; what is no control token's id counts as text.
            progress: Share of the training's steps that are done, 0 to 1.

        Returns:
            For q and for gamma: one number where all tokens have the same, else a float32 tensor
            shaped as `targets`, on their device.
        """
        return self._at(self._q, targets, progress), self._at(self._gamma, targets, progress)

    def is_decision(self, targets: Tensor) -> Tensor:
        """Returns which targets are control tokens, bool, shaped as `targets`."""
        return self._places(targets)[1]

    def _at(self, parameter: _Parameter, targets: Tensor, progress: float) -> float | Tensor:
        text = _number(parameter.text, progress)
        if isinstance(parameter.decision, Tensor):
            place, decision = self._places(targets)
            return torch.where(decision, self._on(targets, parameter.decision)[place], text)
        number = _number(parameter.decision, progress)
        if number == text:
            return number
        return torch.where(self.is_decision(targets), number, text).to(torch.float32)

    def _places(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns each target's place among the sorted ids, and whether it is one of them."""
        ids = self._on(targets, self._ids)
        place = torch.searchsorted(ids, targets.contiguous()).clamp(max=len(ids) - 1)
        return place, ids[place] == targets

    def _on(self, targets: Tensor, table: Tensor) -> Tensor:
        """Returns a table on the targets' device, copied there at the first use only."""
        key = (id(table), targets.device)
        if key not in self._copies:
            self._copies[key] = table.to(targets.device)
        return self._copies[key]


def _ids_by_name(control_ids: Sequence[int], names: Sequence[str]) -> dict[str, int]:
    """Returns the id of each name."""
    ids = dict(zip(names, control_ids, strict=False))
    distinct = len(set(control_ids))
    if not control_ids or not len(names) == len(control_ids) == len(ids) == distinct:
        raise ValueError(
            f"each control token needs one id and one name of its own, not {list(control_ids)} "
            f"and {list(names)}; the respond token is called {RESPOND!r}"
        )
    return ids


def _parameter(
    name: str, decision: Setting, text: float | Schedule, by_name: Mapping[str, int]
) -> _Parameter:
    if isinstance(decision, str):
        raise ValueError(
            f"loss.decision.{name} is still {decision!r}; training/run chooses the numbers"
        )
    if not isinstance(decision, dict):
        return _Parameter(decision, text)
    numbers = [0.0] * len(by_name)
    for category, number in decision.items():
        if category not in by_name:
            raise ValueError(
                f"loss.decision.{name} names {category!r}, which is none of {', '.join(by_name)}"
            )
        numbers[by_name[category]] = number
    return _Parameter(torch.tensor(numbers, dtype=torch.float32), text)


def _number(setting: float | Schedule, progress: float) -> float:
    if isinstance(setting, Schedule):
        return parameter_at(setting.start, setting.end, setting.over, progress)
    return setting
