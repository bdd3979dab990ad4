import stat
from pathlib import Path

from tests.toy import tiny_model
from training.run.export import write_weights


def test_whoever_reads_the_configuration_may_read_the_weights(tmp_path: Path) -> None:
    write_weights(tiny_model(16), tmp_path)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
