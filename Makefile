# Two commands for newcomers: `make demo` and `make test`. Each sets up what it needs in .venv, once.
# Needs Python 3.11 to 3.13 and pip. Choose another Python or folder with `make demo PYTHON=python3.13 VENV=/tmp/env`.

SHELL := /bin/bash
VENV ?= .venv
PORT ?= 7860
MODEL ?= study
# A python can be on PATH and still not run (version managers leave such stubs), so each is tried.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?= -q -n auto --maxprocesses 4 --dist loadfile
# tests/browser.py prints the browser it found; everything else it says goes to stderr.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint notebooks screenshots lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */make \1\t/' | expand -t 18

demo: $(VENV)/demos.stamp  ## open the page at http://127.0.0.1:7860 (MODEL=folder, AGAINST=folder, PORT=number)
	$(BIN)/python -m workbench.cli demo --model "$(MODEL)" --port $(PORT) $(if $(AGAINST),--against "$(AGAINST)")

test: lint  ## everything CI checks: ruff, pyright, pytest
	$(BIN)/python tests/browser.py
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp  ## ruff (notebooks included) and pyright
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

notebooks: $(VENV)/dev.stamp  ## open the tutorials in Jupyter Lab
	$(BIN)/python -m jupyter lab --notebook-dir=.

screenshots: $(VENV)/dev.stamp  ## pictures of every panel, light and dark, into docs/ (OUT=folder)
	$(BIN)/python -m docs.screenshots $(OUT)

lock: $(VENV)/bin/python  ## compute requirements/*.lock anew from pyproject.toml (LOCK_ARGS=--upgrade for newer versions)
	$(PIP) install --quiet uv
	$(call compile,dev)
	$(call compile,demos,-c requirements/dev.lock)

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `fewest`: one version of a package for every Python wherever there is one.
define compile
$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--extra $(1) $(2) -c requirements/torch.txt --excludes requirements/exclude.txt \
	--annotation-style line --custom-compile-command "make lock" $(LOCK_ARGS) -o requirements/$(1).lock
endef

# A stamp is newer than what it was installed from, so the second time costs nothing. torch goes first, by itself:
# it is the largest and the one that a machine may have its own build of.
# Python compiles a file when it is first imported (--no-compile): most of what is installed never is.
$(VENV)/%.stamp: requirements/%.lock pyproject.toml | $(VENV)/bin/python
	@echo "Installing the packages of requirements/$*.lock, once; this takes some minutes."
	$(PIP) install --quiet --no-compile torch -c requirements/$*.lock
	$(PIP) install --quiet --no-compile -r requirements/$*.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# Where Python comes without ensurepip (Debian's does), pip is put in from outside.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; install one or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip --clear $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install pip; }
	@$(BIN)/python --version
