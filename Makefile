# The few commands. CI calls the same (.ci/run). One thread per process: two of them on small cores slow each other down.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CODE := src tests scripts bench
DEMO := lora replay llaca
ARGS ?=  # overrides for the demo, such as ARGS="optim.steps=5"
export OMP_NUM_THREADS ?= 1

.PHONY: help venv demo test test-all check format bench docs mutants pocket-table $(DEMO:%=demo-%)

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 16

venv: $(VENV)/.installed  ## the virtual environment with everything that is needed to work on retain

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[dev,federated]"
	@touch $@

demo: venv  ## three methods on the pocket stream, two at a time; matrices and runs/demo/report.html
	@mkdir -p runs/demo
	@$(MAKE) --no-print-directory -j2 $(DEMO:%=demo-%)
	@$(BIN)/retain compare $(DEMO:%=runs/demo/%)
	@$(BIN)/retain report $(DEMO:%=runs/demo/%) --out runs/demo/report.html

$(DEMO:%=demo-%): demo-%: venv
	@$(BIN)/retain run recipes/pocket/$*.yaml out=runs/demo/$* $(ARGS) 2>&1 | sed -u -e '/^eval /d' -e 's/^/[$*] /'

test: venv  ## the default suite
	$(BIN)/python -m pytest

test-all: venv  ## the default suite and the tests that take minutes
	$(BIN)/python -m pytest -m ""

mutants: venv  ## small faults in methods, mergers, metrics and decoding: which do the tests let pass (hours; goes on where it ended)
	$(BIN)/python scripts/mutants.py --jobs 2 $(ARGS)

check: venv  ## format, lint, types, import direction, generated parts of the docs
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py
	$(BIN)/python scripts/docs.py --check

format: venv  ## put the code into its format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: venv  ## speed and memory beside what a user would pick instead
	$(BIN)/python bench/run.py

docs: venv  ## rewrite the generated parts of README.md
	$(BIN)/python scripts/docs.py

pocket-table: venv  ## every pocket recipe, five seeds, two orders of the tasks (hours); writes docs/results.md, README, cards, recipes
	$(BIN)/python scripts/pocket_table.py --all --orders default reversed
	$(BIN)/python scripts/docs.py
