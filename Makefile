# `make demo` and `make test` are all that a fresh machine with Python 3.11 or newer needs: each target makes the
# virtual environment first if it is missing.
VENV   ?= .venv
PYTHON ?= python3
# Installed before everything else, so that no dependency picks another build of it. Override for a GPU build.
TORCH  ?= torch==2.13.0
# Test processes side by side; each of them computes on one thread.
WORKERS ?= auto

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint format bench clean

help: ## Show the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hf_vlp needs Python 3.11 or newer; name one: make PYTHON=python3.12 install"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# Read as data by one test (the public CLIP vocabulary); its dependencies are not wanted.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps open_clip_torch
	@touch $(STAMP)

demo: $(STAMP) ## Train CLIP -> BLIP-2 on synthetic scenes (about ten minutes on two cores), write outputs/demo/report.html
	$(BIN)/hf-vlp demo --output outputs/demo

test: $(STAMP) ## Run the whole test suite
	$(PYTEST) tests

test-fast: $(STAMP) ## Run the quick subset (under three minutes on two cores)
	$(PYTEST) -m "not slow" tests

lint: $(STAMP) ## Check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Let ruff fix the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Run the side-by-side benchmarks
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## Remove the virtual environment and outputs
	rm -rf $(VENV) outputs
