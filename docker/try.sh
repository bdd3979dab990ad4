#!/bin/sh
# Builds the CPU image without a Docker engine, starts it, asks it, ends it, and says what is in it.
# Usage, as root, in the project's folder: sh docker/try.sh MODEL_DIR [OPTIONS of buildah build]
#   BASE  an image that buildah can pull or has; without it, a Debian 12 made by debootstrap
#   OUT   where the bill of materials goes (./sbom)
# It needs buildah, curl and, without BASE, debootstrap.
set -eu
model=$(cd "$1" && pwd)
shift
out=${OUT:-sbom}
port=8301
url=http://127.0.0.1:$port

if [ -z "${BASE:-}" ]; then
    BASE=localhost/rheostat-base:bookworm
    if ! buildah inspect --type image $BASE >/dev/null 2>&1; then
        root=$(mktemp -d)
        debootstrap --variant=minbase --include=ca-certificates bookworm "$root"
        rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
        empty=$(buildah from scratch)
        buildah add --quiet "$empty" "$root" /
        buildah commit --quiet --rm "$empty" $BASE
        rm -rf "$root"
    fi
fi

build() { # TARGET [OPTIONS]
    target=$1
    shift
    buildah build --isolation chroot --network host --format docker --layers \
        --build-arg "BASE=$BASE" --target "$target" "$@" .
}

began=$(date +%s)
build cpu --tag rheostat:cpu "$@"
echo "built in $(($(date +%s) - began)) s"

container=$(buildah from rheostat:cpu)
trap 'buildah rm "$container" >/dev/null' EXIT
buildah run --isolation chroot --env VLLM_CPU_KVCACHE_SPACE=1 --volume "$model:/model:ro" \
    "$container" -- tini -- rheostat serve --model /model --host 127.0.0.1 --port $port \
    --served-model-name rheostat &
server=$!
began=$(date +%s)
until curl --silent --fail --output /dev/null $url/readyz; do
    kill -0 $server || exit 1
    sleep 1
done
echo "ready in $(($(date +%s) - began)) s"
curl --silent --show-error --fail $url/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "model": "rheostat", "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "max_tokens": 16, "refusal": {"report": true, "categories": {"safety": 0.9}}}'
echo
# buildah would kill what it runs; this isolation shows its processes to the host.
kill -TERM "$(pgrep --newest --full "^[^ ]*tini -- rheostat serve .*--port $port")"
wait $server || echo "ended with status $?"

build cpu-sbom --output "$out" "$@"
mounted=$(buildah mount "$container")
echo "the image's files: $(du -sm "$mounted" | cut -f1) MiB, of which"
du -sm "$mounted"/opt/rheostat/lib/python3*/site-packages/* "$mounted"/usr/* | sort -rn | head -12
echo "bill of materials and licences: $out"
