# Usage: make help
# PYTHON is the interpreter to build the environment from, VENV where it goes.
PYTHON ?= python3
VENV   ?= .venv
# Arguments for `vqbench run`, and for pip when it installs torch (a machine without a GPU can ask
# for the small build: TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu").
ARGS       ?=
TORCH_ARGS ?=

# First and by exactly this pin: a looser spelling picks another build, with GBs of CUDA packages.
TORCH := torch==2.13.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# With an NVIDIA driver, GPU kernels too. Part of the stamps' names: a driver that comes later
# makes a new stamp.
GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo ,triton,cuda)
HAS := $(if $(GPU),-gpu)
# A stamp is touched last, so that an install that was cut short is done again.
STAMP_TORCH := $(VENV)/.done-torch
STAMP_RUN   := $(VENV)/.done-run$(HAS)
STAMP_TEST  := $(VENV)/.done-test$(HAS)
PINS := pyproject.toml constraints.txt

# Tests in a process a core: most of their time is one thread's, of a compiler. Four at most, since
# each compiles what its tests share.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help run test test-sweeps benchmarks lint clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' Makefile

run: $(STAMP_RUN) ## set up what is needed, then measure: vqbench run $(ARGS)
	$(BIN)/vqbench run $(ARGS)

test: lint ## lint, then every test but the sweeps (under 10 minutes)
	$(BIN)/python -m pytest -m "not sweep" $(SIDE_BY_SIDE)

test-sweeps: $(STAMP_TEST) ## the long sweeps over shapes and formats
	$(BIN)/python -m pytest -m sweep $(SIDE_BY_SIDE)

benchmarks: $(STAMP_TEST) ## speed claims, measured against other projects' kernels
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

lint: $(STAMP_TEST) ## style, types, direction of imports, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck .ci/run docs/ci/gate.sh

clean: ## remove the environment, caches and build output
	if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache \
	  .import_linter_cache .hypothesis .benchmarks
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP_TORCH): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'vqbench needs Python 3.11 or newer; "$(PYTHON)" is' \
	    "$$($(PYTHON) --version 2>&1 || true)." \
	    'Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) $(TORCH_ARGS) -c constraints.txt
	@touch $@

$(STAMP_RUN): $(STAMP_TORCH) $(PINS)
	$(PIP) install -e '.[cpu,real$(GPU)]' -c constraints.txt
	@touch $@

# Holds all that `make run` needs, so it answers for that stamp too. vptq, which the VPTQ importer is
# compared with, is in no extra: it asks for gradio, datasets and a plotly of 2022, which its layers
# don't use, and has wheels up to Python 3.12 alone (its source needs a CUDA compiler).
$(STAMP_TEST): $(STAMP_TORCH) $(PINS)
	$(PIP) install -e '.[cpu,real,test,dev$(GPU)]' -c constraints.txt
	@$(PIP) install --no-deps --only-binary :all: vptq -c constraints.txt || \
	  echo 'No wheel of vptq for this Python: the tests that compare with it are skipped.' >&2
	@touch $(STAMP_RUN) $@
