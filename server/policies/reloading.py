"""The policies in force, reloaded when their file changes or on SIGHUP."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from starlette.datastructures import Headers

from models.errors import ConfigError
from server.background import on_daemon, repeated
from server.dials.board import Resolution
from server.policies.book import Caller, PolicyBook
from server.policies.loading import Served, default_policies, load_policies
from server.policies.source import READ_TIMEOUT_S
from server.settings import Settings
from server.telemetry import metrics

# A changed file is read after two equal looks, so not while it is written.
LOOK_EVERY_S = 0.5

_log = logging.getLogger(__name__)

_Stamp = tuple[int, int, int] | None


class Policies:
    """Holds the book in force. It is swapped whole: a request sees one book or the other.

    Args:
        settings: Without a policy file there is one policy, the defaults.
        served: The checkpoint.

    Attributes:
        book: The book in force.

    Raises:
        ConfigError: The file or the defaults are wrong.
    """

    def __init__(self, settings: Settings, served: Served) -> None:
        self.served = served
        self._settings = settings
        self._path = settings.policy_file
        self._api_keys: tuple[str, ...] = ()
        self._tried: _Stamp = None
        self._seen: _Stamp = None
        self.book = self._load()

    def __reduce__(self) -> "tuple[type[Policies], tuple[Settings, Served]]":
        """Another process reads the file itself."""
        return Policies, (self._settings, self.served)

    def caller(self, headers: Headers) -> Caller:
        """Returns who sends a request, by the book in force.

        Raises:
            UnknownCallerError: The caller is unknown.
        """
        return self.book.caller(headers)

    def strictest(self) -> Resolution:
        """Returns dials at every policy's floor, for generation without an HTTP request."""
        return self.book.strictest()

    def fit(self, *, api_keys: Sequence[str]) -> None:
        """Adds vLLM's own API keys, which callers need if there is no policy file.

        Raises:
            ConfigError: There are API keys beside a policy file.
        """
        if api_keys and self._path is not None:
            raise ConfigError(
                "--api-key (or VLLM_API_KEY): RHEOSTAT_POLICY_FILE holds the keys; put their "
                "hashes there (`rheostat policy hash-key`)"
            )
        self._api_keys = tuple(api_keys)
        self.book = self._load()
        if self._path is not None:
            metrics.child(metrics.POLICY_FILE_VALID).set(1)

    @asynccontextmanager
    async def watching(
        self, every_s: float = LOOK_EVERY_S, timeout_s: float = READ_TIMEOUT_S
    ) -> AsyncIterator[None]:
        """Reloads the file when it changes and on SIGHUP, for as long as the block runs."""
        if self._path is None:
            yield
            return
        self._seen = self._tried
        loop = asyncio.get_running_loop()
        look = partial(self._look, self._path, timeout_s)
        async with repeated(look, every_s, finishes=False) as wake:
            loop.add_signal_handler(signal.SIGHUP, wake)
            try:
                yield
            finally:
                # The default handler would end the process on a late signal.
                loop.remove_signal_handler(signal.SIGHUP)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async def _look(self, path: Path, timeout_s: float, hung_up: bool) -> None:
        reads = hung_up
        looking = asyncio.wrap_future(on_daemon(partial(_stamp, path)))
        await asyncio.wait([looking], timeout=timeout_s)
        if not looking.done():  # only one look waits on a mount that hangs
            self._stay(f"{path}: no answer within {timeout_s:g} s")
            reads = True
        found = await looking
        if reads or (found == self._seen and found != self._tried):
            await self._reload(path)
        self._seen = found

    async def _reload(self, path: Path) -> None:
        try:
            book = await asyncio.wrap_future(on_daemon(self._load))
        except ConfigError as error:
            self._stay(error.message)
        except Exception:  # noqa: BLE001  a fault of ours must not end the watch
            _log.exception("the policies stay as they were")
            metrics.count_reload(valid=False)
        else:
            self.book = book
            metrics.count_reload(valid=True)
            _log.info("%s is in force: %s", path, ", ".join(book.policies))

    def _stay(self, why: str) -> None:
        metrics.count_reload(valid=False)
        _log.error("the policies stay as they were: %s", why)

    def _load(self) -> PolicyBook:
        if self._path is None:
            return default_policies(self._settings.defaults, self.served, self._api_keys)
        with suppress(TimeoutError):  # then the file cannot be read either
            self._tried = on_daemon(partial(_stamp, self._path)).result(READ_TIMEOUT_S)
        return load_policies(self._path, self.served)


def _stamp(path: Path) -> _Stamp:
    # It follows links: Kubernetes swaps them.
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
