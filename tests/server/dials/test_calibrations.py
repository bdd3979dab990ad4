from pathlib import Path

import pytest

from models.calibration import calibration_path, save_calibration
from models.errors import CheckpointError, RequestError
from models.hashes import Hashes, checkpoint_hashes
from models.solver import Target
from server.dials.calibrations import load_calibrations
from tests.server.boards import HASHES, calibration, calibrations
from tests.server.manifests import MANIFEST

OTHER = "e" * 64


def test_every_calibration_of_the_folder_is_loaded(tmp_path: Path) -> None:
    for name in ("tenant", "default"):
        save_calibration(tmp_path, calibration(name))
    (tmp_path / "calibrations" / "default.safetensors.7.partial").write_bytes(b"half")
    loaded = load_calibrations(tmp_path, MANIFEST, HASHES)
    assert loaded.names == ["default", "tenant"]
    assert "default" in loaded
    assert "elsewhere" not in loaded


def test_checkpoint_without_calibrations_is_served_and_its_weights_are_not_read(
    tmp_path: Path,
) -> None:
    # There are no weights to read.
    assert load_calibrations(tmp_path, MANIFEST).names == []


def test_hashes_are_those_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "chat_template.jinja").write_text("template")
    (tmp_path / "tokenizer.json").write_text("{}")
    save_calibration(tmp_path, calibration(hashes=checkpoint_hashes(tmp_path)))
    assert load_calibrations(tmp_path, MANIFEST).names == ["default"]
    (tmp_path / "chat_template.jinja").write_text("another")
    with pytest.raises(CheckpointError, match="the template"):
        load_calibrations(tmp_path, MANIFEST)


@pytest.mark.parametrize("what", ["weights", "template", "tokenizer"])
def test_calibration_of_something_else_is_refused_with_both_hashes(
    tmp_path: Path, what: str
) -> None:
    ours = getattr(HASHES, what)
    save_calibration(tmp_path, calibration())
    served = HASHES.model_copy(update={what: OTHER})
    with pytest.raises(CheckpointError) as caught:
        load_calibrations(tmp_path, MANIFEST, Hashes(**served.model_dump()))
    message = caught.value.message
    assert ours[:12] in message
    assert OTHER[:12] in message
    assert what in message
    assert "\n" not in message


def test_file_under_another_name_is_refused(tmp_path: Path) -> None:
    path = save_calibration(tmp_path, calibration("tenant"))
    path.rename(calibration_path(tmp_path, "default"))
    with pytest.raises(CheckpointError, match=r"default\.safetensors.*'tenant'"):
        load_calibrations(tmp_path, MANIFEST, HASHES)


def test_broken_file_is_refused(tmp_path: Path) -> None:
    path = save_calibration(tmp_path, calibration())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"default\.safetensors"):
        load_calibrations(tmp_path, MANIFEST, HASHES)


def test_one_categorys_bias_is_told_for_a_floor() -> None:
    loaded = calibrations("tenant")
    category = MANIFEST.names[0]
    where = "policies.kiosk.floors"
    # 30 % of the 40 margins -19.5 ... 19.5: the 12 from 8.5 on; midway to 7.5.
    assert loaded.bias_alone("tenant", category, Target(rate=0.3), param=where) == -8.0
    with pytest.raises(RequestError, match=f"{where}: .* needs at least .* benign") as caught:
        loaded.bias_alone("tenant", category, Target(false_refusal_rate=0.001), param=where)
    assert caught.value.param == where
    with pytest.raises(RequestError, match=f"{where}: no calibration is named 'default'"):
        loaded.bias_alone("default", category, Target(rate=0.3), param=where)
