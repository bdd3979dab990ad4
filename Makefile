# Two commands on a fresh machine are the whole set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := cpu,train,smollm2,wandb,dev
STAMP := .venv/.rheostat-$(shell echo $(EXTRAS) | cat - pyproject.toml constraints.txt docker/install.sh | cksum | cut -d' ' -f1)

.PHONY: setup demo test test-long setup-tools test-tools lint bench bench-training fuzz soak screenshots manifests lock

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit("rheostat needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@VENV=.venv sh docker/install.sh $(EXTRAS)
	@rm -f .venv/.rheostat-*; touch $@

demo: setup
	@$(BIN)/rheostat demo

# In two processes; tests/conftest.py says which tests share servers.
test: setup
	@$(BIN)/python -m pytest -n 2

# What `make test` leaves out: the tests with the marker "long".
test-long: setup
	@$(BIN)/python -m pytest -m long

# Other people's tools, in .tools: 10 minutes and 3 GB the first time, so no part of CI.
setup-tools: setup
	@PYTHON=$(BIN)/python TOOLS=.tools sh tests/e2e/tools/install.sh

test-tools: setup-tools
	@$(BIN)/python -m pytest -m tools tests/e2e/tools

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

fuzz: setup
	@FUZZ_S=$${FUZZ_S:-1800} $(BIN)/python -m pytest -m long tests/e2e/test_fuzz.py tests/e2e/test_conversations.py

# A server under mixed load, for SECONDS.
SECONDS ?= 600
soak: setup
	@SOAK_S=$(SECONDS) $(BIN)/python -m pytest -m long --log-cli-level=INFO tests/e2e/test_soak.py

# What the server costs; BENCH=--quick for fewer rounds.
bench: setup
	@test -e checkpoints/demo/rheostat.json || $(BIN)/rheostat train demo
	@$(BIN)/python -m benchmarks.costs $(BENCH) --out bench/costs
	@$(BIN)/python -m benchmarks.serving $(BENCH) --out bench/serving

bench-training: setup
	@$(BIN)/python -m benchmarks.losses --out bench/losses
	@$(BIN)/python -m benchmarks.losses.label_noise --out bench/losses
	@$(BIN)/python -m benchmarks.fused_head --out bench/fused_head.json
	@test -e checkpoints/demo/rheostat.json || $(BIN)/rheostat train demo
	@$(BIN)/python -m benchmarks.calibration --out bench/calibration

screenshots: setup
	@$(BIN)/python -m tests.e2e.page.screenshots

manifests: setup
	@$(BIN)/python -m tests.docker.chart

# LOCK_OPTIONS are uv's, such as --find-links DIR or --extra-index-url for the CPU build of torch.
lock: setup
	@$(BIN)/python -m pip install --quiet --target .venv/uv uv==0.13.9
	@PYTHONPATH=.venv/uv $(BIN)/python docker/lock.py $(LOCK_OPTIONS)
