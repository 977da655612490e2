# The targets that people and CI call; see `make help`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup nemo-env quickstart quickstart-video2world test test-all test-nemo test-matrix check clean

# The interpreter that makes .venv; Python 3.11 or newer.
PYTHON ?= python3
# A package index to take torch from, and nothing else; empty means pip's own. Plain Linux torch
# brings several GB of CUDA libraries: on a machine without a GPU, name PyTorch's index of CPU builds.
TORCH_INDEX_URL ?=
# Of make quickstart: --videos DIR, --output DIR; of quickstart-video2world: --output DIR. QUICK=1 makes it short.
QUICKSTART_ARGS ?=
# The environment of make nemo-env: NeMo wants older packages than the rest.
NEMO_VENV ?= $(CURDIR)/.venv-nemo
NEMO_STAMP := $(NEMO_VENV)/.cosmos_posttrain_nemo
# Processes that run tests at the same time: two a core of two, since tests wait for others, too.
TEST_WORKERS ?= 4

# An active virtual environment is used as it is; otherwise one is made here.
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
export PATH := $(VENV)/bin:$(PATH)
# One checkout at a time is installed in an environment: the stamp names the one that is.
STAMPS := $(VENV)/.cosmos_posttrain_setup
STAMP := $(STAMPS)-$(firstword $(shell echo "$(CURDIR)" | cksum))

PYTEST := python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile

help:  ## This list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)  ## Installs everything into .venv (or the active environment), once

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) scripts/install_plan.py check-python
	if [ ! -x "$(VENV)/bin/python" ]; then $(PYTHON) -m venv "$(VENV)"; fi
	if [ -n "$(TORCH_INDEX_URL)" ]; then
	    "$(VENV)/bin/python" -m pip install --index-url "$(TORCH_INDEX_URL)" --constraint constraints.txt torch
	fi
	"$(VENV)/bin/python" -m pip install --constraint constraints.txt --editable '.[dev,samples]'
	rm -f "$(STAMPS)"-*
	touch "$@"

nemo-env: $(NEMO_STAMP)  ## NeMo 2.7.3 for the CPU in an environment of its own, .venv-nemo (Python 3.11 or 3.12), once

# NeMo and modelopt come without what they ask for, which is CUDA packages and much that is not imported.
$(NEMO_STAMP): pyproject.toml constraints-nemo.txt
	@$(PYTHON) scripts/install_plan.py check-nemo "$(NEMO_VENV)"
	if [ ! -x "$(NEMO_VENV)/bin/python" ]; then $(PYTHON) -m venv "$(NEMO_VENV)"; fi
	if [ -n "$(TORCH_INDEX_URL)" ]; then
	    "$(NEMO_VENV)/bin/python" -m pip install --index-url "$(TORCH_INDEX_URL)" --constraint constraints-nemo.txt torch
	fi
	"$(NEMO_VENV)/bin/python" -m pip install --constraint constraints-nemo.txt --editable '.[nemo]' pytest
	"$(NEMO_VENV)/bin/python" -m pip install --constraint constraints-nemo.txt --no-deps nemo_toolkit nvidia-modelopt
	"$(NEMO_VENV)/bin/python" -W ignore -c 'from nemo import lightning; from nemo.collections import llm; llm.api.train'
	touch "$@"

quickstart: setup  ## The whole job in miniature on the CPU: a video, a loss curve, a report (QUICK=1: in two minutes)
	@bash recipes/quickstart.sh $(QUICKSTART_ARGS)

quickstart-video2world: setup  ## Likewise with text: a caption decides where things go (QUICK=1: in a minute)
	@bash recipes/quickstart_video2world.sh $(QUICKSTART_ARGS)

# One thread a process: results do not depend on the machine, and workers do not fight for cores.
test: setup  ## The default tests: offline, on the CPU
	@OMP_NUM_THREADS=1 $(PYTEST)

test-all: setup  ## Also the slow ones, and those for a GPU and the network where they can run
	@export OMP_NUM_THREADS=1
	$(PYTEST) -m "not gpu"
	python -m pytest -m gpu

# This checkout's package, whichever one is installed there.
test-nemo: nemo-env  ## The tests of NeMo's engine, connector, recipes and NeMo-Run's executors, in that environment
	@export PATH="$(NEMO_VENV)/bin:$$PATH" PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1
	python -m pytest -m "not gpu" tests/nemo tests/submit

# PAIRS="3.11/0.15.3 3.12/0.19.2" names some of them.
test-matrix: setup  ## Other versions of Python and megatron-core: what they might break (docs/versions.md)
	@python scripts/test_matrix.py $(PAIRS)

check: setup  ## Lint, format and types
	@ruff check .
	ruff format --check .
	mypy

clean:  ## Removes caches and build products (not .venv, not results)
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache ./*.egg-info
	find . -path ./.venv -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
