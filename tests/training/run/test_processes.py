import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.checkpoint import load_checkpoint
from models.errors import ConfigError
from tests.training.conftest import WriteRows, small_rows
from tests.training.killing import SPAWN
from tests.training.recipes import log_of, losses_of, tiny_config, weights_of
from training.config.recipe import TrainConfig
from training.run.processes import Processes
from training.run.train import train
from training.serving import free_port

ROOT = Path(__file__).parents[3]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def _config(data: Path, **optimisation: Any) -> TrainConfig:
    return tiny_config(
        data,
        loss={"decision": {"q": 0.5, "weight": 4}, "text": {"gamma": 1.0}},
        evaluation={"data": [str(data)], "every": 0.5},
        # 31 rows by 8: the last step of a pass is a short one.
        optimisation={"epochs": 1, "save_every": 0.5, **optimisation},
    )


def _launch(config: TrainConfig, folder: Path) -> str:
    recipe = folder / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    done = subprocess.run(
        [*LAUNCH, "-m", "rheostat", "train", str(recipe), "--out", str(folder / "two")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_two_processes_have_the_losses_of_one(write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows(small_rows()[:-1])
    one = train(_config(data), tmp_path / "one")
    accumulated = train(
        _config(data, batch_size=2, gradient_accumulation_steps=4), tmp_path / "accumulated"
    )
    told = _launch(_config(data, batch_size=4), tmp_path)

    two = tmp_path / "two"
    assert told.count("ready for `rheostat serve") == 1
    for other in (accumulated, two):
        load_checkpoint(other)
        assert len(losses_of(one)) == len(losses_of(other)) == 4
        for expected, found in zip(losses_of(one), losses_of(other), strict=True):
            assert found == pytest.approx(expected, rel=2e-4)
        whole, shared = weights_of(one), weights_of(other)
        for name, weight in whole.items():
            assert torch.allclose(weight, shared[name], atol=2e-4), name
        final, expected_final = (_final(folder) for folder in (other, one))
        assert final == pytest.approx(expected_final, abs=1e-3)
    assert sorted(path.name for path in two.iterdir()) == sorted(
        path.name for path in one.iterdir()
    )


def _final(folder: Path) -> dict[str, float]:
    return next(line["final"] for line in log_of(folder) if "final" in line)


def _mistaken(rank: int, port: int, outcomes: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = Processes()

    def act() -> None:
        # `on_main` calls it on the first process, `together` on both.
        if processes.index == mistaken:
            raise ConfigError("wrong")

    for mistaken, let in enumerate((processes.on_main, processes.together)):
        try:
            let(act)
        except (ConfigError, SystemExit) as error:
            outcomes.put((mistaken, rank, type(error).__name__))
    processes.wait()


def test_mistake_is_raised_by_one_of_two_processes_and_ends_the_other_silently() -> None:
    outcomes = SPAWN.Queue()
    port = free_port()
    processes = [SPAWN.Process(target=_mistaken, args=(rank, port, outcomes)) for rank in (0, 1)]
    for process in processes:
        process.start()

    assert {outcomes.get(timeout=120) for _ in range(4)} == {
        *((0, 0, "ConfigError"), (0, 1, "SystemExit")),
        *((1, 0, "SystemExit"), (1, 1, "ConfigError")),
    }
    for process in processes:
        process.join()


def test_error_on_the_first_process_is_raised_there() -> None:
    def act() -> None:
        raise ConfigError("wrong")

    processes = Processes()

    assert processes.is_main
    for let in (processes.on_main, processes.together):
        assert let(lambda: 3) == 3
        with pytest.raises(ConfigError, match="wrong"):
            let(act)


# --- FSDP -----------------------------------------------------------------------------------------


@pytest.fixture
def fsdp() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "training/fsdp/8gpu.yaml").read_text())
    return loaded


def test_fsdp_configuration_holds_only_options_that_the_launcher_takes(
    fsdp: dict[str, Any],
) -> None:
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}

    assert fsdp["fsdp_config"]
    assert set(fsdp["fsdp_config"]) <= known


def test_fsdp_plugin_can_be_built_from_the_configuration(
    fsdp: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(
        ["--config_file", str(ROOT / "training/fsdp/8gpu.yaml"), "--module", "rheostat"]
    )
    arguments, _, _ = _validate_launch_command(arguments)
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)

    plugin: Any = FullyShardedDataParallelPlugin()

    assert arguments.use_fsdp
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "SHARDED" in str(plugin.state_dict_type)
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False
