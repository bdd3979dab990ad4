import socket
from pathlib import Path

import pytest

from models.errors import ConfigError
from training.demo import run


def test_demo_names_a_taken_port_before_it_trains(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port: int = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use"):
            run(tmp_path / "demo", port, once=True)
    assert list(tmp_path.iterdir()) == []
