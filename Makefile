# Everything runs in .venv, made from `PYTHON` with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
STAMP = $(shell $(PYTHON) -c 'import hashlib, sys; print(sys.version_info[:3], hashlib.sha256(open("pyproject.toml", "rb").read() + open("constraints.txt", "rb").read()).hexdigest())')

.PHONY: quickstart test test-slow check venv clean help

help:  ## what there is to run
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: venv  ## train a small model on real text: minutes on two CPU cores
	$(RUN) -m pretrain.main --config configs/pretrain/quickstart.py

test: venv  ## the default tests: at most ten minutes on two cores
	$(RUN) -m pytest -q

test-slow: venv  ## optional packages, real small models, ahead-of-time compiles, fault loops
	$(RUN) -m pytest -q -m slow

check: venv  ## format, lint, types, then the default tests
	$(BIN)/pip install -qq -c constraints.txt -e '.[dev]'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(RUN) -m pytest -q

venv:
	@if [ "$$(cat $(VENV)/stamp 2>/dev/null)" != "$(STAMP)" ]; then \
	  echo "installing into $(VENV)"; \
	  $(PYTHON) -m venv --clear $(VENV) && \
	  $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e . && \
	  echo "$(STAMP)" > $(VENV)/stamp; \
	fi

clean:  ## remove the environment and what was built; run folders stay
	rm -rf $(VENV) .venv-* *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
