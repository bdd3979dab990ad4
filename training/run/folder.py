"""The folder of a training run: one run at a time, resumable, and renamed when it is done."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from models.errors import CheckpointError, ConfigError
from models.files import write_atomically
from models.manifest import MANIFEST_NAME, Recipe, load_manifest

IDENTITY_NAME = "run.json"
# In bytes: file systems take 255, and a run puts `.replaced` behind it.
LONGEST_NAME = 240


class Identity(NamedTuple):
    """What two runs must have in common so that one can go on where the other ended."""

    config_sha256: str
    data_sha256: dict[str, str]
    processes: int


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the lock of an output folder; it ends with the process, however that ends.

    Raises:
        ConfigError: Another process trains there, or no folder of that name can be made.
    """
    if not 0 < len(os.fsencode(out.name)) <= LONGEST_NAME:
        raise ConfigError(f"{out}: cannot be the name of a folder; choose another with --out")
    path = out.with_name(f".{out.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, out)
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written: {error.strerror}; choose another place with --out"
        ) from error
    try:
        yield
    finally:
        # While it is still held, so that nobody locks a file that has no name any more.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, out: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode() or "unknown"
            os.close(descriptor)
            raise ConfigError(
                f"{out}: another training run (process {holder}) writes there; wait for it or "
                "choose another place with --out"
            ) from error
        if _is_still_named(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)


def _is_still_named(path: Path, descriptor: int) -> bool:
    """Returns whether the file was not unlinked between opening and locking it."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def keeps(out: Path, recipe: Recipe, *, force: bool, replace_stale: bool) -> bool:
    """Returns whether the checkpoint at `out` is what the run would make.

    Raises:
        ConfigError: Something else is there that may not be replaced.
    """
    if not os.path.lexists(out):
        return False
    if not (out / MANIFEST_NAME).is_file():
        raise ConfigError(f"{out}: exists and is not a checkpoint of ours; choose another place")
    fresh = not force and _fresh(out, recipe, replace_stale=replace_stale)
    if not fresh and out.is_symlink():
        raise ConfigError(f"{out}: is a symbolic link, which no run replaces; remove it")
    return fresh


def _fresh(out: Path, recipe: Recipe, *, replace_stale: bool) -> bool:
    fresh = _is_made_from(out, recipe)
    if not fresh and not replace_stale:
        raise ConfigError(
            f"{out}: holds a checkpoint of another recipe or other data; choose another place, "
            "or replace it with --force"
        )
    return fresh


def _is_made_from(out: Path, recipe: Recipe) -> bool:
    try:
        made = load_manifest(out).recipe
    except CheckpointError:
        return False
    return made is not None and (made.config_sha256, made.data_sha256) == (
        recipe.config_sha256,
        recipe.data_sha256,
    )


class Opened(NamedTuple):
    """What a run finds where it writes.

    Attributes:
        discarded: What was removed and why; None where nothing was.
        finished: Whether an earlier process had all done but to give the folder its name.
    """

    discarded: str | None
    finished: bool


def open_partial(partial: Path, identity: Identity) -> Opened:
    """Makes the folder that a run writes to, or opens the one that it left.

    Args:
        partial: The folder. What an interrupted run with the same identity left there is kept,
            what another left is removed.

    Raises:
        ConfigError: The folder holds something that no run left.
    """
    found = _identity_of(partial)
    for finished in (False, True):
        if found == _record(identity, finished=finished):
            return Opened(None, finished)
    discarded = None
    if partial.exists():
        discarded = (
            f"{partial}: an interrupted run of another recipe, other data or another number of "
            "processes lies there and is discarded"
            if found
            else None
        )
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write_atomically(partial / IDENTITY_NAME, _record(identity, finished=False))
    return Opened(discarded, finished=False)


def mark_finished(partial: Path, identity: Identity) -> None:
    """Notes that nothing is left to do but to give the folder its name."""
    write_atomically(partial / IDENTITY_NAME, _record(identity, finished=True))


def _record(identity: Identity, *, finished: bool) -> str:
    return json.dumps({**identity._asdict(), "finished": finished}) + "\n"


def _identity_of(partial: Path) -> str | None:
    try:
        return (partial / IDENTITY_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Killed before it had written anything.
        if not os.path.lexists(partial):
            return None
        whole = partial.is_dir() and not partial.is_symlink()
        if whole and not set(os.listdir(partial)) - {f"{IDENTITY_NAME}.partial"}:
            return None
        raise ConfigError(
            f"{partial}: is where the run would write, and no training run left it; move it away "
            "or choose another place with --out"
        ) from None


def put_in_place(partial: Path, out: Path) -> None:
    """Gives a finished folder its name, in place of what has it."""
    replaced = out.with_name(f"{out.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    (out / IDENTITY_NAME).unlink(missing_ok=True)
    if replaced.exists():
        shutil.rmtree(replaced)
