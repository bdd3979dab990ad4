"""Several HTTP processes for the same engines, which end together: ``--api-server-count``.

As vLLM's ``run_multi_api_server``, which starts its own server in each process.
"""

import multiprocessing
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from socket import socket
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvloop

from models.errors import ConfigError, RheostatError, ServiceError
from server import vllm_names
from server.lifetime import RELEASE_S, log_to_stderr
from server.settings import Settings
from server.telemetry.listener import bind
from server.workers.shared import HttpProcess, SharedCounts

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.executor import Executor


def listen(args: Namespace, settings: Settings) -> HttpProcess:
    """Returns the one HTTP process of a server, its addresses bound before the engine loads.

    Raises:
        ConfigError: An address is not free, or none of this machine's.
    """
    try:
        _, sock = vllm_names.setup_server(args, reuse_port=False)
    except OSError as error:
        raise ConfigError(f"--port {args.port}: {error.strerror}") from error
    return HttpProcess(sock, bind(settings))


def share(alone: HttpProcess, most: int) -> HttpProcess:
    """Returns what all HTTP processes are told, before they are started.

    Args:
        alone: With the bound addresses.
        most: How many answers may be under way.
    """
    vllm_names.setup_multiprocess_prometheus()
    context = multiprocessing.get_context("spawn")
    counts = SharedCounts(context, most)
    return replace(alone, counts=counts, lock=context.RLock())


def serve_together(
    config: "VllmConfig",
    executor_class: "type[Executor]",
    args: Namespace,
    shared: HttpProcess,
    run: Callable[[Namespace, HttpProcess], Coroutine[Any, Any, None]],
) -> None:
    """Starts engines and HTTP processes, and serves until a signal or until one of them ends.

    Args:
        config: The engines', steered.
        executor_class: Runs the workers.
        args: vLLM's flags.
        shared: What all HTTP processes are told.
        run: Serves in one of them, until a signal.

    Raises:
        ServiceError: A process has ended by itself.
    """
    listeners = vllm_names.bind_engine_zmq_listeners(config, args.api_server_count)
    family = _Family(args.shutdown_timeout)
    try:
        with vllm_names.launch_core_engines(
            config, executor_class, not args.disable_log_stats, listeners.addresses
        ) as launch:
            family.engines = launch.engine_manager
            family.coordinator = launch.coordinator
            stats = launch.coordinator and launch.coordinator.get_stats_publish_address()
            family.http = vllm_names.APIServerProcessManager(
                listen_address="",
                sock=shared.sock,
                args=args,
                num_servers=args.api_server_count,
                input_listeners=listeners.inputs,
                output_listeners=listeners.outputs,
                target_server_fn=partial(_work, run, shared),
                stats_update_address=stats,
                tensor_queue=launch.tensor_queue,
            )
            launch.watched_frontend_processes = family.http.processes
            family.follow_signals()
        family.watch()
    finally:
        family.end()


def _work(
    run: Callable[[Namespace, HttpProcess], Coroutine[Any, Any, None]],
    shared: HttpProcess,
    _address: str,
    sock: socket,
    args: Namespace,
    client: dict[str, Any],
) -> None:
    """Serves in an HTTP process, as vLLM's manager calls it."""
    vllm_names.configure_logging_from_args(args)
    log_to_stderr()
    loads, index = client.pop("api_server_loads"), client.pop("client_index")
    del client["client_count"]
    vllm_names.set_process_title("APIServer", str(index))
    scraped = shared.scraped if index == 0 else None
    try:
        mine = replace(
            shared, sock=sock, scraped=scraped, index=index, loads=(loads, index), engine=client
        )
        uvloop.run(run(args, mine))
    except RheostatError as error:
        sys.exit(f"rheostat: {error.message}")


class _Family:
    """The processes that end together.

    Args:
        drain_s: How long what is in flight may take at the end.

    Attributes:
        http: vLLM's manager of HTTP processes.
        engines: Its manager of engines; None where all are on other machines.
        coordinator: Its process between several engines.
    """

    http: Any = None
    engines: Any = None
    coordinator: Any = None

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._ends = False

    def follow_signals(self) -> None:
        """Passes SIGHUP on; SIGTERM or SIGINT ends the processes, drained, a second one at once."""
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # there is a policy file
            signal.signal(signal.SIGHUP, lambda number, _: self._send(number))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def watch(self) -> None:
        """Waits until a process ends, which none does by itself.

        Raises:
            ServiceError: It names the process.
        """
        engines = [*getattr(self.engines, "processes", ())]
        coordinator = [self.coordinator.proc] if self.coordinator else []
        running = {each.sentinel: each for each in (*self._http, *engines, *coordinator)}
        ended = running[connection.wait(running)[0]]
        if ended not in self._http:
            # The SIGTERM that follows is the second signal: no answer will come.
            self._send(signal.SIGINT)
        raise ServiceError(f"{ended.name} has ended by itself, and the server with it: see above")

    def end(self) -> None:
        """Ends all processes, those that answer first."""
        self._ends = True
        if self.http:
            self.http.shutdown(timeout=self._drain_s + RELEASE_S)
        for manager in (self.engines, self.coordinator):
            if manager:
                manager.shutdown(timeout=RELEASE_S)

    @property
    def _http(self) -> Sequence[BaseProcess]:
        return self.http.processes if self.http else ()

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        if self._ends:
            self._send(signal.SIGINT)
            return
        self._ends = True
        raise SystemExit

    def _send(self, number: int) -> None:
        for process in self._http:
            if process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
