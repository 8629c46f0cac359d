# Every target is one line over `python -m papers VERB` or pytest. An active virtual environment, or PYTHON=, is used
# as it is; otherwise .venv is made here from pyproject.toml and constraints.txt before anything runs in it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install list reproduce compare report parity test lint bench data convert cite doctor mutants mlflow clean env

ifdef PYTHON
  OWN :=
else ifdef VIRTUAL_ENV
  PYTHON := python
else ifdef CONDA_PREFIX
  PYTHON := python
else
  OWN := .venv/.complete
  PYTHON := .venv/bin/python
endif
BASE ?= python3
RUN = "$(PYTHON)" -m papers
PYTEST = "$(PYTHON)" -m pytest
FLAGS = $(if $(SCALE),--scale $(SCALE)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DRY),--dry) $(if $(V),-v)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo '  Example: make reproduce PAPER=clip [SCALE=smoke|mini|field|gpu|paper] [SEEDS=n] [DRY=1] [V=1] [ARGS="key=value ..."]'

install: env  ## build the environment (.venv, or the active one, or PYTHON=)
	@$(if $(OWN),true,"$(PYTHON)" -m pip install -c constraints.txt -e ".[dev]")

env: $(OWN)
	@"$(PYTHON)" -c 'import importlib.util as u, sys; n=[m for m in ("torch", "lightning", "omegaconf", "mlflow", "papers") if not u.find_spec(m)]; sys.exit("this environment ("+sys.prefix+") lacks "+", ".join(n)+": run `make install` to install into it" if n and "$(MAKECMDGOALS)" != "install" else 0)'

.venv/.complete: pyproject.toml constraints.txt
	@echo "[setup] building .venv (a download of about 3 GB, some minutes; once)"
	@$(BASE) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or later is needed; name one with BASE=python3.11")'
	@$(BASE) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch .venv/.complete

list: env  ## the papers, their scales and what is measured of them
	@$(RUN) list

reproduce: env  ## reported against reproduced, on four rungs: PAPER=clip (PAPER=all for every paper)
	@$(if $(PAPER),$(RUN) reproduce $(PAPER) $(FLAGS) $(ARGS),$(RUN) list)

compare: env  ## one table over all papers and scales, from results/
	@$(RUN) compare

report: env  ## the newest report of PAPER: its table and where it lies
	@$(RUN) report $(PAPER)

parity: env  ## our outputs, losses and gradients against independent implementations
	@$(PYTEST) tests/parity $(ARGS)

test: env  ## all tests: no network, no GPU, under 10 minutes on 2 cores
	@OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile tests $(ARGS)  # a thread each: four that spin on two cores are slow

lint: env  ## format, lint, types, direction of imports, recipes against their schema, generated tables
	@"$(PYTHON)" -m ruff format --check . && "$(PYTHON)" -m ruff check . && "$(PYTHON)" -c 'from importlinter.cli import lint_imports_command as main; main()' && "$(PYTHON)" -m mypy && $(RUN) check

bench: env  ## ours against other libraries: same weights, same bytes, in turns, in one run
	@$(RUN) bench $(if $(PAPER),$(PAPER),clip) $(ARGS)

data: env  ## fetch and check what PAPER's recipes need (all papers without PAPER)
	@$(RUN) fetch $(if $(PAPER),--paper $(PAPER)) $(ARGS)

convert: env  ## published weights to ours and back: ARGS="IN OUT --variant clip-vit-b-32 --to transformers"
	@$(RUN) convert $(ARGS)

cite: env  ## BibTeX of PAPER, its data and base weights
	@$(RUN) cite $(PAPER)

doctor: env  ## what this machine has, lacks and could run, with a block to paste into an issue
	@$(RUN) doctor $(PAPER) $(ARGS)

mutants: env  ## planted faults: every one must be caught by the tests
	@"$(PYTHON)" tests/mutants/run.py $(ARGS)

mlflow: env  ## browse the tracked runs on this machine's own address, 127.0.0.1:5000
	@echo "open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning (MLflow's own start page shows no training runs)"
	@"$(PYTHON)" -m mlflow server --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db} --host 127.0.0.1 --port 5000

clean:  ## remove runs and caches (not the environment, not results/)
	@rm -rf runs .pytest_cache .ruff_cache .import_linter_cache .mypy_cache *.egg-info && find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
