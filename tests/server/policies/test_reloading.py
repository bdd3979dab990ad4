import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from models.errors import ConfigError, UnknownCallerError
from server.policies.reloading import Policies
from server.settings import Settings
from tests.server.hanging import HangingPath
from tests.server.policybooks import ACME_KEY, TWO_TENANTS, headers, served

STRICTER = TWO_TENANTS.replace("safety: 0.8}", "safety: 0.85}")
SOON_S = 0.005


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policies.yaml"
    path.write_text(TWO_TENANTS)
    return path


def opened(path: Path) -> Policies:
    # Made without validation, which would make another path of it.
    return Policies(Settings.model_construct(policy_file=path), served())


def desk_floor(policies: Policies) -> float:
    caller = policies.caller(headers(x_api_key=ACME_KEY))
    return caller.policy("desk").board.bounds.floors[0]


def reloads(result: str) -> float:
    return (
        REGISTRY.get_sample_value(
            "rheostat_policy_reloads_total", {"model_name": "", "result": result}
        )
        or 0.0
    )


def is_valid() -> bool:
    return REGISTRY.get_sample_value("rheostat_policy_file_valid", {"model_name": ""}) == 1


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(SOON_S)


def watch(
    policies: Policies,
    during: Coroutine[Any, Any, None],
    every_s: float = SOON_S,
    timeout_s: float = 30,
) -> None:
    async def serve() -> None:
        async with policies.watching(every_s, timeout_s):
            await during

    asyncio.run(serve())


def test_changed_file_is_in_force_soon(path: Path) -> None:
    policies = opened(path)
    before, count = desk_floor(policies), reloads("ok")

    async def change() -> None:
        path.write_text(STRICTER)
        await until(lambda: desk_floor(policies) > before)

    watch(policies, change())
    assert reloads("ok") == count + 1
    assert is_valid()


def publish(volume: Path, text: str, version: str) -> None:
    """Writes a ConfigMap's volume as the kubelet does: a new folder, swapped in by its link."""
    folder = volume / f"..2026_11_27_{version}"
    folder.mkdir()
    (folder / "policies.yaml").write_text(text)
    data, file = volume / "..data", volume / "policies.yaml"
    old = data.resolve() if data.exists() else None
    (volume / "..data_tmp").symlink_to(folder.name)
    (volume / "..data_tmp").rename(data)
    if old is None:
        file.symlink_to("..data/policies.yaml")
    else:
        shutil.rmtree(old)


def test_config_map_that_the_kubelet_swaps_is_in_force_each_time(tmp_path: Path) -> None:
    publish(tmp_path, TWO_TENANTS, "0")
    policies = opened(tmp_path / "policies.yaml")
    first, bad = desk_floor(policies), reloads("bad")

    async def swap(text: str, version: str) -> None:
        book = policies.book
        publish(tmp_path, text, version)
        await until(lambda: policies.book is not book)

    async def change() -> None:
        await swap(STRICTER, "1")
        await swap(TWO_TENANTS, "2")
        assert desk_floor(policies) == first
        await swap(STRICTER, "3")

    watch(policies, change())
    assert desk_floor(policies) > first
    assert reloads("bad") == bad


def test_config_map_whose_new_version_is_bad_leaves_the_old_one(tmp_path: Path) -> None:
    publish(tmp_path, TWO_TENANTS, "0")
    policies = opened(tmp_path / "policies.yaml")
    book, bad = policies.book, reloads("bad")

    async def change() -> None:
        publish(tmp_path, "policies: [", "1")
        await until(lambda: reloads("bad") == bad + 1)
        assert policies.book is book
        publish(tmp_path, STRICTER, "2")
        await until(is_valid)

    watch(policies, change())
    assert policies.book is not book


def test_hang_up_reads_the_file_again_at_once(path: Path) -> None:
    policies = opened(path)
    before, count = desk_floor(policies), reloads("ok")

    async def change() -> None:
        path.write_text(STRICTER)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: desk_floor(policies) > before)
        os.kill(os.getpid(), signal.SIGHUP)  # also where nothing has changed
        await until(lambda: reloads("ok") == count + 2)

    watch(policies, change(), every_s=3600)


def put(path: Path, text: str) -> None:
    """Writes a file at once: half of it would be a version of its own."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


@pytest.mark.parametrize(
    "bad", ["policies: [", "policies: {}", "", TWO_TENANTS + "more: 1\n", None]
)
def test_bad_file_leaves_the_old_policies_in_force_and_says_so(
    path: Path, bad: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    policies = opened(path)
    book, count = policies.book, reloads("bad")

    async def change() -> None:
        if bad is None:
            path.unlink()
        else:
            put(path, bad)
        await until(lambda: reloads("bad") == count + 1)
        assert policies.book is book
        assert not is_valid()
        assert str(path) in caplog.text
        put(path, STRICTER)
        await until(is_valid)

    watch(policies, change())
    assert policies.book is not book
    assert reloads("bad") == count + 1


def test_bad_file_is_told_once_and_not_at_every_look(path: Path) -> None:
    policies = opened(path)
    bad, ok = reloads("bad"), reloads("ok")

    async def change() -> None:
        put(path, "nothing")
        await until(lambda: reloads("bad") == bad + 1)
        for _ in range(20):
            await asyncio.sleep(SOON_S)

    watch(policies, change())
    assert (reloads("bad"), reloads("ok")) == (bad + 1, ok)


def test_fifo_in_the_files_place_is_a_bad_file_like_any_other(path: Path) -> None:
    policies = opened(path)
    before, count = desk_floor(policies), reloads("bad")

    async def change() -> None:
        path.unlink()
        os.mkfifo(path)
        await until(lambda: reloads("bad") == count + 1)
        path.unlink()
        path.write_text(STRICTER)
        await until(lambda: desk_floor(policies) > before)

    watch(policies, change())
    assert is_valid()


def test_mount_that_hangs_is_told_and_read_when_it_answers(path: Path) -> None:
    policies = opened(HangingPath(path))
    threads, bad, ok = set(threading.enumerate()), reloads("bad"), reloads("ok")

    async def change() -> None:
        with HangingPath.hangs():
            await until(lambda: reloads("bad") == bad + 1)
            assert not is_valid()
            assert len(set(threading.enumerate()) - threads) == 1
        await until(lambda: reloads("ok") == ok + 1)

    watch(policies, change(), timeout_s=1)
    assert is_valid()


def test_mount_that_hangs_keeps_no_process_from_its_end(path: Path) -> None:
    script = f"""
import asyncio
from server.policies.reloading import Policies
from server.settings import Settings
from tests.server.hanging import HangingPath
from tests.server.policybooks import served

policies = Policies(Settings.model_construct(policy_file=HangingPath({str(path)!r})), served())

async def serve():
    async with policies.watching(0.001):
        hangs.__enter__()
        await asyncio.sleep(0.1)

hangs = HangingPath.hangs()
asyncio.run(serve())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_callers_in_flight_keep_the_policy_that_they_began_with(path: Path) -> None:
    policies = opened(path)
    caller = policies.caller(headers(x_api_key=ACME_KEY))
    policy = caller.policy("desk")

    async def change() -> None:
        path.write_text(STRICTER.replace("[desk, lab]", "[lab]"))
        await until(lambda: policies.caller(headers(x_api_key=ACME_KEY)) is not caller)

    watch(policies, change())
    assert caller.policy("desk") is policy


def test_requests_see_one_book_or_the_other_while_it_is_swapped(path: Path) -> None:
    # Each version gives tenant and floor together; a mixture would be neither.
    versions = {"a": ("desk", 0.8), "b": ("desk", 0.85)}
    policies = opened(path)
    seen: set[tuple[str, float]] = set()

    async def change() -> None:
        for _ in range(5):
            for _, floor in versions.values():
                path.write_text(TWO_TENANTS.replace("safety: 0.8}", f"safety: {floor}}}"))
                count = reloads("ok")
                os.kill(os.getpid(), signal.SIGHUP)
                while reloads("ok") == count:
                    policy = policies.caller(headers(x_api_key=ACME_KEY)).policy()
                    seen.add((policy.name, round(policy.board.bounds.floors[0], 3)))
                    await asyncio.sleep(0)

    watch(policies, change(), every_s=3600)
    assert seen == {("desk", 1.386), ("desk", 1.735)}


def test_bad_file_is_refused_at_start(path: Path) -> None:
    path.write_text("policies: {}")
    with pytest.raises(ConfigError, match=r"policies\.yaml:1: policies"):
        opened(path)


def test_api_keys_beside_a_policy_file_are_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--api-key .*RHEOSTAT_POLICY_FILE") as caught:
        opened(path).fit(api_keys=["key"])
    assert "\n" not in caught.value.message


def test_without_a_file_api_keys_guard_the_one_policy() -> None:
    policies = Policies(Settings(), served())
    assert policies.caller(headers()).policy().name == "default"
    policies.fit(api_keys=["key"])
    with pytest.raises(UnknownCallerError):
        policies.caller(headers())
    assert policies.caller(headers(authorization="Bearer key")).policy().name == "default"


def test_without_a_file_nothing_is_watched_and_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGHUP)

    async def serve() -> None:
        async with Policies(Settings(), served()).watching():
            assert signal.getsignal(signal.SIGHUP) == before

    asyncio.run(serve())
