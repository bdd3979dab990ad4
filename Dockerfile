# The server as an image: `--target cpu` or `--target gpu`. docs/docker.md says how to use it.
#
# BASE may be any Debian or Ubuntu of amd64 with the Python of docker/locked-*.txt, in it or in its
# packages: 3.11 for the CPU, 3.12 for GPUs. The defaults: Python's own slim image for the CPU; for
# GPUs NVIDIA's of the CUDA that the wheels of torch are built with. Those wheels bring CUDA's
# libraries; "devel" is for nvcc and the headers, with which FlashInfer and Triton compile kernels
# while a model loads.
ARG BASE

FROM ${BASE:-python:3.11-slim-bookworm} AS cpu-system
# torch.compile builds kernels with g++ and Python's headers when a model loads; vllm's CPU kernels
# need libnuma. tini is process 1: without it a SIGTERM that arrives while the model loads is
# ignored, as process 1 has no default action for signals.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 tini \
 && { python3 -c 'import ensurepip, sysconfig, os; os.stat(sysconfig.get_path("include") + "/Python.h")' \
      || apt-get install --yes --no-install-recommends python3 python3-dev python3-venv; } \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /cache rheostat \
 && install --directory --owner rheostat --group rheostat /cache \
 && python3 -m venv /opt/rheostat

FROM cpu-system AS cpu-dependencies
WORKDIR /src
COPY docker/install.sh docker/locked-cpu.txt docker/
RUN VENV=/opt/rheostat PIP_NO_CACHE_DIR=1 sh docker/install.sh cpu dependencies

FROM cpu-system AS wheel
WORKDIR /src
COPY . .
RUN /opt/rheostat/bin/pip wheel --quiet --no-cache-dir --no-deps --wheel-dir /wheel .

FROM cpu-dependencies AS cpu
COPY --from=wheel /wheel /wheel
RUN /opt/rheostat/bin/pip install --quiet --no-cache-dir --no-deps /wheel/*.whl
ENV PATH=/opt/rheostat/bin:$PATH \
    HOME=/cache \
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /cache
EXPOSE 8000
# Metrics and probes, without a key: publish it to nobody.
EXPOSE 9400
# Healthy means that it can answer, which depends_on and rolling updates wait for. A large model
# loads for minutes; failures in the start period do not count, a success ends it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "rheostat", "serve", "--model", "/model", "--host", "0.0.0.0", "--port", "8000", "--metrics-host", "0.0.0.0", "--metrics-port", "9400"]

FROM ${BASE:-nvidia/cuda:13.0.3-devel-ubuntu24.04} AS gpu-system
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 tini \
 && { python3 -c 'import ensurepip, sysconfig, os; os.stat(sysconfig.get_path("include") + "/Python.h")' \
      || apt-get install --yes --no-install-recommends python3 python3-dev python3-venv; } \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /cache rheostat \
 && install --directory --owner rheostat --group rheostat /cache \
 && python3 -m venv /opt/rheostat

FROM gpu-system AS gpu-dependencies
WORKDIR /src
COPY docker/install.sh docker/locked-gpu.txt docker/
RUN VENV=/opt/rheostat PIP_NO_CACHE_DIR=1 sh docker/install.sh gpu dependencies

FROM gpu-dependencies AS gpu
COPY --from=wheel /wheel /wheel
RUN /opt/rheostat/bin/pip install --quiet --no-cache-dir --no-deps /wheel/*.whl
ENV PATH=/opt/rheostat/bin:$PATH \
    HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /cache
EXPOSE 8000
# Metrics and probes, without a key: publish it to nobody.
EXPOSE 9400
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "rheostat", "serve", "--model", "/model", "--host", "0.0.0.0", "--port", "8000", "--metrics-host", "0.0.0.0", "--metrics-port", "9400"]

# What is in an image: `docker build --target cpu-sbom --output sbom .`
FROM cpu AS cpu-described
USER root
COPY docker/describe.sh /src/
RUN sh /src/describe.sh

FROM scratch AS cpu-sbom
COPY --from=cpu-described /sbom /

FROM gpu AS gpu-described
USER root
COPY docker/describe.sh /src/
RUN sh /src/describe.sh

FROM scratch AS gpu-sbom
COPY --from=gpu-described /sbom /
