"""``rheostat serve`` and ``rheostat policy``. Everything heavy is imported by its command."""

import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.policies.book import PolicyBook
    from server.policies.file import PolicyFile

# Long enough to give a tenant a new key.
EXPIRES_SOON = timedelta(days=14)

ModelOption = Annotated[
    str, typer.Option("--model", help="A checkpoint folder with rheostat.json, or a hub name.")
]

app = typer.Typer(add_completion=False, rich_markup_mode=None)
policy = typer.Typer(no_args_is_help=True, help="Check a policy file, make keys for it.")
app.add_typer(policy, name="policy")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: rheostat serve --model checkpoints/demo --port 8000 --enforce-eager. "
    "`python -m vllm.entrypoints.launchers.api_server.entry --help` lists vLLM's flags.",
)
def serve(
    ctx: typer.Context,
    model: ModelOption,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve metrics and probes here too, without a key.")
    ] = None,
    metrics_host: Annotated[
        str | None, typer.Option(help="The address of --metrics-port.", show_default="127.0.0.1")
    ] = None,
) -> None:
    """Serve a checkpoint over vLLM's OpenAI-compatible API.

    Requests may have a `refusal` object (docs/requests.md). Every other flag goes to vLLM's server
    unchanged (--port, --tensor-parallel-size, ...). The checkpoint is verified before the engine
    starts. RHEOSTAT_DEFAULTS is a JSON `refusal` object with the dials of requests that bring
    none. RHEOSTAT_POLICY_FILE replaces it: policies, and which tenants may follow them
    (docs/policies.md).
    """
    from models.checkpoint import load_checkpoint, resolve_checkpoint
    from server.dials.calibrations import load_calibrations
    from server.lifetime import ignore_hangups, log_to_stderr
    from server.policies.loading import Served
    from server.policies.reloading import Policies
    from server.settings import load_settings

    log_to_stderr()
    settings = load_settings(metrics_port=metrics_port, metrics_host=metrics_host)
    directory = resolve_checkpoint(model, revision)
    manifest, _ = load_checkpoint(directory)
    calibrations = load_calibrations(directory, manifest)
    policies = Policies(settings, Served(manifest, calibrations))
    if settings.policy_file is not None:
        ignore_hangups()

    from server import engine

    arguments = ["--model", str(directory), *ctx.args]
    if str(directory) != model and "--served-model-name" not in ctx.args:
        arguments += ["--served-model-name", model]
    engine.serve(engine.parse_flags(arguments), manifest, settings, policies)


@policy.command(
    epilog="Example: rheostat policy check policies.yaml --model checkpoints/demo. Exit status 1: "
    "a server would reject the file."
)
def check(
    file: Annotated[Path, typer.Argument(help="The policy file.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Also check against this checkpoint."),
    ] = None,
) -> None:
    """Report every problem of a policy file with its line.

    With --model, also check that its categories exist and that the checkpoint's calibrations
    reach its rates. Warn of keys that have expired or expire within 14 days.
    """
    from server.policies.credentials import now
    from server.policies.file import read_policy_file
    from server.policies.source import FileError

    try:
        read = read_policy_file(file).file
        book = None if model is None else _loaded(file, model)
    except FileError as error:
        for problem in error.problems:
            typer.echo(problem, err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{file}: {len(read.policies)} policies ({', '.join(read.policies)}), {len(read.tenants)} "
        f"tenants, unknown callers: {read.anonymous or '401'}"
    )
    for warning in _expiries(read, now()):
        typer.echo(f"{file}: {warning}", err=True)
    for active in book.policies.values() if book else ():
        names, bounds = active.board.names, active.board.bounds
        for name, floor, ceiling in zip(names, bounds.floors, bounds.ceilings, strict=True):
            typer.echo(f"{active.name}.{name}: biases from {floor:.4g} to {ceiling:.4g}")


@policy.command(
    epilog="Examples: rheostat policy hash-key; rheostat policy hash-key < key.txt. A key is never "
    "an argument, because the shell's history and the list of processes show arguments."
)
def hash_key() -> None:
    """Make a key and its hash, or hash the key on standard input."""
    from server.policies import credentials

    key = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    if key:
        credentials.check_strength(key)
    else:
        key = credentials.generate_key()
        typer.echo(f"key:  {key}")
    typer.echo(f"hash: {credentials.hash_key(key)}")


def _expiries(file: "PolicyFile", now: datetime) -> Iterator[str]:
    entries = [
        (f"tenants.{name}.keys.{place}", key)
        for name, tenant in file.tenants.items()
        for place, key in enumerate(tenant.keys)
    ]
    secrets = file.gateway.secrets if file.gateway else ()
    entries += [(f"gateway.secrets.{place}", secret) for place, secret in enumerate(secrets)]
    for where, key in entries:
        if key.expired(now + EXPIRES_SOON):
            verb = "expired" if key.expired(now) else "expires"
            yield f"{where}: warning: {verb} at {key.expires}"


def _loaded(file: Path, model: str) -> "PolicyBook":
    from models.checkpoint import resolve_checkpoint
    from models.manifest import load_manifest
    from server.dials.calibrations import load_calibrations
    from server.policies.loading import Served, load_policies

    directory = resolve_checkpoint(model)
    manifest = load_manifest(directory)
    return load_policies(file, Served(manifest, load_calibrations(directory, manifest)))
