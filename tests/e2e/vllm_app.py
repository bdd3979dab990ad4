"""Prints what vLLM's own app registers, as JSON: run as a process of its own.

Everything that a flag, an environment variable or a task of the model can turn on is on.
"""

import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, get_args

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}
FLAGS = ["--enable-scale-out", "--enable-tokenizer-info-endpoint", "--enable-fault-tolerance"]
FLAGS += ["--enable-offline-docs", "--profiler-config.profiler", "torch"]
FLAGS += ["--profiler-config.torch_profiler_dir", "/tmp/profile"]


def routes_of(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Returns method and path of each route, also of those in included routers."""
    for route in routes:
        path: Any = getattr(route, "path", None)
        methods = getattr(route, "methods", None)
        if type(route).__name__ == "Mount":
            yield "MOUNT", path
        elif path is not None:  # no websocket is taken, and its routes have no method
            yield from ((method, path) for method in sorted(methods or ()) if method != "HEAD")
        else:
            yield from routes_of(route.original_router.routes)


def all_tasks() -> tuple[str, ...]:
    """Returns every task that a model may support."""
    import vllm.tasks

    return tuple(
        task
        for kind in vars(vllm.tasks).values()
        for task in get_args(kind)
        if isinstance(task, str)
    )


def routers() -> Iterator[Any]:
    """Returns every router of every module, registered or not."""
    import vllm.entrypoints
    from fastapi import APIRouter

    for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if module.name.endswith("api_router"):
            members = vars(importlib.import_module(module.name)).values()
            yield from (member for member in members if isinstance(member, APIRouter))


def main() -> None:
    """Prints the routes of a server with its defaults and with everything on, and its OpenAPI."""
    from vllm.entrypoints.launchers.app import build_app

    from server.engine import parse_flags

    model = ["--model", sys.argv[1]]
    plain = build_app(parse_flags(model), ("generate",))
    found: dict[str, Any] = {
        "openapi": plain.openapi(),
        "plain": sorted(set(routes_of(plain.routes))),
    }
    os.environ.update(ENVIRONMENT)
    full = build_app(parse_flags([*model, *FLAGS]), all_tasks())  # type: ignore[arg-type]
    everything = {*routes_of(full.routes)}
    for router in routers():
        everything |= {*routes_of(router.routes)}
    found["everything"] = sorted(everything)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
