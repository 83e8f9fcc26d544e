# One environment, made on demand: `make quickstart` and `make test` need only Python 3.11 and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
QUICKSTART := build/quickstart
# Files of tests in parallel, a thread each: tests of a file share models, and many start processes of their own.
PARALLEL := -n logical --maxprocesses=4 --dist=loadfile
test test-lowest test-newest: export OMP_NUM_THREADS ?= 1

.PHONY: help quickstart test test-all test-lowest test-newest lint docs package bench bench-growth gpu clean

help:
	@echo "make quickstart   fine-tune a real model on example data and see what it gained (under 10 minutes on 2 cores)"
	@echo "make test         lint, types and tests"
	@echo "make test-all     the same with the slow tests"
	@echo "make test-lowest  the tests with the lowest release of each package that pyproject.toml allows (gigabytes of wheels)"
	@echo "make test-newest  the tests with the newest release of each package"
	@echo "make docs         these pages and the API as HTML, in build/docs"
	@echo "make package      build the source archive and the wheel, and try the wheel in an environment of its own"
	@echo "make bench        ours, TRL and LitGPT side by side (BENCH='--data rows.jsonl ...'; BENCH=--help has all settings)"
	@echo "make bench-growth how cost grows (BENCH=--quick for minutes)"
	@echo "make gpu          check and measure on a GPU, also without a network (GPU='correctness smoke'; GPU=--help)"
	@echo "make clean        remove the environment and what was built"

$(BIN)/lightning-sft: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[tensorboard]'
	touch $@

$(VENV)/dev: $(BIN)/lightning-sft
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

quickstart: $(BIN)/lightning-sft
	$(BIN)/python docs/quickstart.py --folder $(QUICKSTART)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

# Warnings of other releases are no errors there. trl asks for newer packages than ours do, and only its templates are read.
build/lowest/bin/pytest: pyproject.toml
	$(PYTHON) -m venv --clear build/lowest
	$(PYTHON) .ci/lowest.py > build/lowest/constraints.txt
	build/lowest/bin/python -m pip install --quiet --constraint build/lowest/constraints.txt --editable '.[test]'
	build/lowest/bin/python -m pip install --quiet --constraint build/lowest/constraints.txt --no-deps trl

build/newest/bin/pytest: pyproject.toml
	$(PYTHON) -m venv --clear build/newest
	build/newest/bin/python -m pip install --quiet --editable '.[dev]'

test-lowest test-newest: test-%: build/%/bin/pytest
	build/$*/bin/python -m pytest $(PARALLEL) -m "not slow" --override-ini filterwarnings=default

$(VENV)/docs: $(BIN)/lightning-sft
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $@

docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going docs build/docs

package: $(VENV)/dev
	rm -rf build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist
	$(BIN)/python -m twine check --strict build/dist/*
	$(BIN)/python .ci/try_wheel.py build/dist/*.whl

bench bench-growth:
	$(PYTHON) -m benchmarks.environments ours trl
	build/bench/ours/bin/python -m benchmarks$(if $(findstring growth,$@),.growth) $(BENCH)

gpu: # in the environment of the shell: such a machine has a torch of its own
	python3 -m benchmarks.gpu $(GPU)

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache
