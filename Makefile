# `make demo` is the whole journey; `make test` is what CI runs first. Both make .venv when it is missing.
PYTHON ?= python3
PIP := --quiet --constraint .ci/constraints.txt
VENV := .venv
BIN := $(VENV)/bin
# Two processes; of quick tests a file stays in one of them, so that its fixtures are made once.
PYTEST := -m pytest --numprocesses 2 --dist
STAMP := $(VENV)/.installed

.PHONY: demo install test test-slow lint types clean

demo: install
	@$(BIN)/sae demo

install: $(STAMP)

$(STAMP): pyproject.toml Makefile .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make install PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP) torch
	$(BIN)/pip install $(PIP) --editable '.[test]'
	$(BIN)/python -m activations.embedded
	@touch $(STAMP)

test: install
	$(BIN)/python $(PYTEST) loadfile -m "not slow"

test-slow: install
	$(BIN)/python $(PYTEST) worksteal -m slow

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
