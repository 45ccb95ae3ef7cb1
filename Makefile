# make venv      the environment in .venv, pinned (a no-op when nothing changed)
# make cascade   the whole cascade on the nano model, then the report
# make test      lint, fast tests, smoke; make test-slow the rest
# make help      every target
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11
VENV ?= .venv
TORCH ?= torch==2.13.0
# Where torch comes from. Unless pip is configured to look somewhere of its own, the index of CPU builds: PyPI's for Linux
# brings gigabytes of CUDA. Another one: make venv TORCH_INDEX=https://...; pip's default: make venv TORCH_INDEX=
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell $(PYTHON) -m pip config list 2>/dev/null | grep -qE 'index-url|find-links' || echo $(CPU_INDEX))
CASCADE ?= nano
SEEDS ?= 11 12 13 14 15
WORKERS ?= 2
BENCH_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/nemo-cascade
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two processes share two cores: one thread each. Dynamo compiles nothing here and costs seconds at every start.
export OMP_NUM_THREADS ?= 1
export TORCHDYNAMO_DISABLE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help venv tools-present bwrap cascade cascade-seeds nano-base nano-judge lint test test-fast test-slow smoke bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*##/\t/' | expand -t 16

# --- the environment ---------------------------------------------------------------------------------------------------

tools-present:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on PATH: install Python 3.11, or name one: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V): Python 3.11 is needed (megatron-core 0.16.1, NeMo); make venv PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "$(PYTHON) has no venv module: apt-get install python3.11-venv" >&2; exit 1; }
	@command -v git >/dev/null || { echo "git is not on PATH: the software-engineering tasks are git repositories; apt-get install git" >&2; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { echo "no C compiler on PATH: the nano model's decode step is compiled with one; apt-get install gcc" >&2; exit 1; }

venv: $(VENV)/.done  ## the pinned environment in $(VENV)

$(VENV)/.torch: | tools-present
	@echo "environment 1/3: $(TORCH)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

# --no-deps: the files pin every distribution, so there is nothing to resolve and nothing to drift.
$(VENV)/.packages: $(VENV)/.torch requirements/base.txt requirements/trackers.txt requirements/dev.txt
	@echo "environment 2/3: requirements/dev.txt"
	@$(PIP) install -qq --no-deps -r requirements/dev.txt
	@touch $@

$(VENV)/.done: $(VENV)/.packages setup.py
	@echo "environment 3/3: nemo_cascade itself, from this folder"
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@$(PIP) check --quiet || { echo "the pinned set contradicts itself: see requirements/" >&2; exit 1; }
	@touch $@

bwrap:  ## bubblewrap, which keeps generated code away from your files
	@if command -v bwrap >/dev/null; then true; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	{ apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends bubblewrap; } >/dev/null; then true; \
	else echo "bubblewrap (bwrap) is missing: the code tasks run inside it. Install it, then run make again:" >&2; \
	echo "    sudo apt-get install bubblewrap" >&2; exit 1; fi

# --- the cascade -------------------------------------------------------------------------------------------------------

cascade: bwrap venv  ## the whole cascade on a CPU; ends with the path of its report
	@$(RUN) run $(CASCADE)

cascade-seeds: bwrap venv  ## the cascade once for each of SEEDS (hours), then the table over seeds
	@$(BIN)/python -m tools.cascade_seeds --cascade $(CASCADE) --seeds $(SEEDS) --out runs/seeds.md

nano-base: bwrap venv  ## train the base model again that ships with the package (about an hour)
	@$(RUN) run nano_base
	@$(BIN)/python -m tools.ship_nano runs/nano_base nemo_cascade/models/nano/base

nano-judge: bwrap venv  ## train the preference judge again that ships with the package
	@$(RUN) run nano_judge
	@$(BIN)/python -m tools.ship_nano runs/nano_judge nemo_cascade/models/nano/judge

# --- checks ------------------------------------------------------------------------------------------------------------

lint: venv  ## ruff, import layers, size budget
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@$(BIN)/python tools/check_budget.py

test: bwrap lint test-fast smoke  ## what every change must pass

test-fast: bwrap venv
	@$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) $(PYTEST_ARGS)

test-slow: bwrap venv  ## the tests that train for minutes
	@$(BIN)/python -m pytest -m "slow and not gpu" --ignore tests/flow/test_smoke.py $(PYTEST_ARGS)

smoke: bwrap venv  ## the whole nano cascade, two steps a stage; a second run finds everything done
	@for file in conf/cascade/*.yaml; do $(RUN) check $$file; done
	@$(BIN)/python -m pytest -q -s --durations=0 tests/flow/test_smoke.py $(PYTEST_ARGS)

# --- peers -------------------------------------------------------------------------------------------------------------

$(VENV)/.bench: $(VENV)/.done requirements/bench.txt
	@echo "requirements/bench.txt: TRL, what it asks for, and atheris (300 MB)"
	@$(PIP) install -qq --no-deps -r requirements/bench.txt
	@$(PIP) check --quiet || { echo "the pinned set contradicts itself: see requirements/" >&2; exit 1; }
	@touch $@

bench: venv $(VENV)/.bench  ## training against transformers and TRL, which it installs (BENCH_ARGS: options)
	@$(BIN)/python -m tools.bench.learner $(BENCH_ARGS)

clean:  ## remove runs/ (the environment stays)
	@rm -rf runs
