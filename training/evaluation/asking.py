"""Asks a server each thing once, with a bar of progress and a memory."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.progress import Progress

from models.errors import EvaluationError
from training.client import (
    RejectedError,
    Reply,
    RheostatClient,
    Scores,
    Settings,
    check_finite,
    messages_of,
    together,
)
from training.data.rows import Row
from training.evaluation.cache import Cache


class Ask(NamedTuple):
    """One chat request: a row's prompt under some settings."""

    row: Row
    settings: Settings = Settings()


class Asker:
    """Asks one server.

    Args:
        names: The `k` categories in manifest order.
        cache: What was answered before a run was killed.
        bars: Gets a bar for each kind of question.
    """

    def __init__(
        self, client: RheostatClient, names: Sequence[str], cache: Cache, bars: Progress
    ) -> None:
        self._client = client
        self.names = tuple(names)
        self.cache = cache
        self._bars = bars

    def bar(self, what: str, total: int) -> Callable[[], object]:
        """Returns what moves a new bar one step; there is none where nothing is to be done."""
        if not total:
            return lambda: None
        bar = self._bars.add_task(what, total=total)
        return lambda: self._bars.advance(bar)

    async def scores(self, rows: Sequence[Row], what: str) -> list[Scores]:
        """Scores prompts.

        Args:
            what: Stands beside the bar.

        Raises:
            RejectedError: The server rejects one of them.
            EvaluationError: It does not answer as it should.
        """
        keys = [["score", messages_of(row.prompt)] for row in rows]
        # A prompt that occurs twice is scored once.
        left = list({str(key): at for at, key in enumerate(keys) if key not in self.cache}.values())
        bar = self._bars.add_task(what, total=len(rows), completed=len(rows) - len(left))

        def keep(places: Sequence[int], scores: Sequence[Scores]) -> None:
            check_finite(places, scores, missing, self.names)
            for place, score in zip(places, scores, strict=True):
                self.cache[keys[left[place]]] = score
            self._bars.advance(bar, len(places))

        missing = [rows[at] for at in left]
        if missing:
            await self._client.score(missing, self.names, keep)
        found = [self.cache[key] for key in keys]
        return [Scores(tuple(margins), *rest) for margins, *rest in found]

    async def replies(self, asked: Sequence[Ask], what: str) -> list[Reply]:
        """Sends chat requests, many at once, and returns the replies in order."""
        model = await self._client.model()
        bar = self._bars.add_task(what, total=len(asked))

        async def one(ask: Ask) -> Reply:
            key = ["chat", messages_of(ask.row.prompt), ask.settings]
            if key not in self.cache:
                self.cache[key] = await self._reply(model, ask)
            self._bars.advance(bar)
            return Reply(*self.cache[key])

        return await together(one(ask) for ask in asked)

    async def _reply(self, model: str, ask: Ask) -> Reply:
        try:
            reply = await self._client.ask(model, ask.row.prompt, ask.settings)
        except RejectedError as error:
            raise RejectedError(
                f"{ask.row.origin}: {error.message}", error.status, error.place
            ) from error
        if lacking := set(self.names) - set(reply.margins):
            raise EvaluationError(f"the server reports no margin for {min(lacking)!r}")
        return reply
