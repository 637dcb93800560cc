# Everything a newcomer needs: `make demo` and `make test`. The environment is built once and kept in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export RAY_AUTH_MODE ?= disabled

.PHONY: install demo test test-slow lint bench
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[pipeline,dev]'
	touch $@

demo: install
	$(BIN)/adsc run demo

test: install
	$(BIN)/pytest -m 'not slow and not gpu'

test-slow: install
	$(BIN)/pytest -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Ratios on this machine, a few minutes each; docs/performance.md says how to read them.
bench: install
	$(BIN)/python -m benchmarks.prefill --json runs/bench/prefill.json
	$(BIN)/python -m benchmarks.decode --json runs/bench/decode.json
	$(BIN)/python -m benchmarks.train --json runs/bench/train.json
