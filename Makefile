# make demo   the main job on bundled data        make test   the tests
# make check  format, lint, types, contracts      make slow   the tests that take minutes
# make env    the environment alone
PYTHON ?= python3
BIN := .venv/bin

.PHONY: env demo test slow check bench docs clean
.DEFAULT_GOAL := demo

# constraints.txt pins every version; the CPU build of torch is asked for where the default one would bring CUDA along.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Umbel needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

env: .venv/ready

demo: env
	$(BIN)/umbel run digits

# A file's tests share its fixtures, and the files that take longest come early.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: env
	$(PYTEST) -m "not slow"

slow: env
	$(PYTEST) -m slow

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: env
	$(BIN)/python benchmarks/rounds.py
	$(BIN)/python benchmarks/accounting.py

docs: env
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/figures.py

clean:
	rm -rf .venv build *.egg-info
