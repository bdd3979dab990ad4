from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from models.manifest import save_manifest
from rheostat import app
from server.policies.credentials import check_strength, hash_key
from tests.server.manifests import MANIFEST
from tests.server.policybooks import ACME_KEY, SECRET, TWO_TENANTS


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["policy", *arguments], input=stdin)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policies.yaml"
    path.write_text(TWO_TENANTS)
    return path


def test_good_file_is_summed_up(path: Path) -> None:
    done = run("check", str(path))
    assert done.exit_code == 0
    assert done.output == (
        f"{path}: 3 policies (desk, lab, kiosk), 2 tenants, unknown callers: 401\n"
    )


def test_every_problem_has_its_line(path: Path) -> None:
    path.write_text(TWO_TENANTS.replace("0.9", "1.9").replace("refuse", "ban"))
    done = run("check", str(path))
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:3", f"{path}:10"]


def test_checkpoint_says_what_it_cannot_do(path: Path, tmp_path: Path) -> None:
    save_manifest(tmp_path, MANIFEST)
    done = run("check", str(path), "--model", str(tmp_path))
    assert done.exit_code == 0
    assert "desk.safety: biases from 1.386 to inf" in done.output
    path.write_text(TWO_TENANTS.replace("{safety: 0.8}", "{weather: 0.8, safety: {rate: 0.3}}"))
    assert run("check", str(path)).exit_code == 0
    done = run("check", str(path), "--model", str(tmp_path))
    assert done.exit_code == 1
    assert f"{path}:4: policies.desk.floors.weather: this checkpoint has no such" in done.output


def test_keys_that_end_soon_are_told(path: Path) -> None:
    now = datetime.now(UTC)
    ends = {name: (now + timedelta(days=days)).date() for name, days in (("a", 13), ("b", 16))}
    written = TWO_TENANTS.replace(
        f'["{hash_key(ACME_KEY)}"]',
        f"[{{hash: {hash_key(ACME_KEY)}, expires: 2020-01-01}},"
        f" {{hash: {hash_key('a')}, expires: {ends['a']}}},"
        f" {{hash: {hash_key('b')}, expires: {ends['b']}}}]",
    ).replace(f'["{hash_key(SECRET)}"]', f"[{{hash: {hash_key(SECRET)}, expires: {now.date()}}}]")
    path.write_text(written)
    done = run("check", str(path))
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [
        f"{path}: tenants.acme.keys.0: warning: expired at 2020-01-01 00:00:00+00:00",
        f"{path}: tenants.acme.keys.1: warning: expires at {ends['a']} 00:00:00+00:00",
        f"{path}: gateway.secrets.0: warning: expired at {now.date()} 00:00:00+00:00",
    ]


def test_new_key_is_printed_once_beside_its_hash() -> None:
    first, second = run("hash-key"), run("hash-key")
    assert first.exit_code == 0
    assert first.output != second.output
    key, hashed = (line.split()[1] for line in first.output.splitlines())
    check_strength(key)
    assert hashed == hash_key(key)


def test_given_key_is_hashed_and_not_repeated() -> None:
    key = "k" * 40
    for stdin in (key, key + "\n"):
        done = run("hash-key", stdin=stdin)
        assert done.output == f"hash: {hash_key(key)}\n"


def test_weak_key_is_refused() -> None:
    done = run("hash-key", stdin="hunter2\n")
    assert done.exit_code == 1
    assert "22" in str(done.exception)


def test_key_is_no_argument() -> None:
    assert run("hash-key", "k" * 40).exit_code == 2
