"""``rheostat policy``: looks at a policy file before a server does, and makes the keys for it."""

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

policy = typer.Typer(no_args_is_help=True, help="Check a policy file, make keys for it.")


@policy.command(
    epilog="Example: rheostat policy check policies.yaml --model checkpoints/demo. Exit status 1: "
    "the file would be refused."
)
def check(
    file: Annotated[Path, typer.Argument(help="The policy file.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The checkpoint: its categories and calibrations count too."),
    ] = None,
) -> None:
    """Say every problem of a policy file with its line, or what it holds.

    With --model also whether its categories exist, and whether its rates can be had from the
    checkpoint's calibrations. Keys that have expired or will within 14 days are told as well.
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
    "an argument: those stand in the shell's history and in the list of processes."
)
def hash_key() -> None:
    """Make a key and its hash for a policy file, or hash the key on the standard input."""
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
