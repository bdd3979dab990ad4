#!/bin/sh
# Installs the tools of `make test-tools` into $TOOLS, each apart: their dependencies clash with each
# other and with vLLM's. Usage: PYTHON=python3 TOOLS=.tools sh tests/e2e/tools/install.sh
set -eu
here=$(dirname "$0")
torch=$(mktemp)
trap 'rm -f "$torch"' EXIT
# garak wants torch; the version of constraints.txt is what pip may have already.
sed -n 's/^\(torch==[^+]*\).*/\1/p' "$here/../../../constraints.txt" >"$torch"
for list in "$here"/*.txt; do
    tool=$(basename "$list" .txt)
    test -x "$TOOLS/$tool/bin/python" || "$PYTHON" -m venv "$TOOLS/$tool"
    echo "rheostat: installing $tool into $TOOLS/$tool"
    "$TOOLS/$tool/bin/python" -m pip --disable-pip-version-check install --quiet \
        --requirement "$list" --constraint "$torch"
done
mkdir -p "$TOOLS/promptfoo"
cp "$here/package.json" "$TOOLS/promptfoo/"
echo "rheostat: installing promptfoo into $TOOLS/promptfoo"
npm install --prefix "$TOOLS/promptfoo" --silent --no-fund --no-audit
