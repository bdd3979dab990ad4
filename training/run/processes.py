"""The processes of one training run: which of them writes, and what they agree on."""

import sys
from collections.abc import Callable
from typing import TypeVar

from models.errors import RheostatError

Outcome = TypeVar("Outcome")


def is_first_process() -> bool:
    """Tells whether this process speaks for those that were started together."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


class Processes:
    """The processes that `accelerate launch` or `torchrun` started together, or this one alone."""

    count: int
    index: int

    def __init__(self) -> None:
        import torch
        from accelerate import PartialState

        # Without `cpu`, accelerate takes several processes on CPUs for one each.
        self._state = PartialState(cpu=not torch.accelerator.is_available())
        self.count = self._state.num_processes
        self.index = self._state.process_index

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def wait(self) -> None:
        """Returns once all processes are here."""
        self._state.wait_for_everyone()

    def on_main(self, act: Callable[[], Outcome]) -> Outcome:
        """Lets the first process act while the others wait.

        Args:
            act: What it does. The result must be picklable where there are several processes.

        Raises:
            RheostatError: What `act` raised. The other processes end silently: one line is enough.
        """
        if self.count == 1:
            return act()
        result: tuple[Outcome | None, RheostatError | None] = (None, None)
        if self.is_main:
            try:
                result = (act(), None)
            except RheostatError as error:
                result = (None, error)
        return self._broadcast(result)

    def together(self, act: Callable[[], Outcome]) -> Outcome:
        """Lets every process act, and one of them speak where it goes wrong.

        Raises:
            RheostatError: What `act` raised, in the first process where it did. All others end
                silently, also those where nothing went wrong.
        """
        if self.count == 1:
            return act()
        outcome: list[Outcome] = []
        wrong: RheostatError | None = None
        try:
            outcome.append(act())
        except RheostatError as error:
            wrong = error
        from accelerate.utils import gather_object

        failed: list[bool] = gather_object([wrong is not None])
        if not any(failed):
            return outcome[0]
        if wrong is not None and failed.index(True) == self.index:
            raise wrong
        sys.exit(1)

    def _broadcast(self, result: tuple[Outcome | None, RheostatError | None]) -> Outcome:
        from accelerate.utils import broadcast_object_list

        error_seen = result[1] is not None
        shared: list[object] = [None if error_seen else result[0], error_seen]
        broadcast_object_list(shared)
        if result[1] is not None:
            raise result[1]
        if shared[1]:
            sys.exit(1)
        outcome: Outcome = shared[0]  # type: ignore[assignment]
        return outcome
