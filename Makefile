# Both commands set up what they need in .venv and do their work; nothing else has to be run before them.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# A process a core, each with one thread.
PARALLEL := --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: demo test test-slow lint clean

demo: .venv/.demo
	$(BIN)/rlx run --algo ppo --reward exact_match

test: .venv/.dev
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: .venv/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not gpu"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/typetree.py
	$(BIN)/mypy
	PYTHONPATH=.typetree $(BIN)/lint-imports

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable ".[plots]"
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable ".[dev]"
	touch $@ .venv/.demo

clean:
	rm -rf .venv .typetree build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
