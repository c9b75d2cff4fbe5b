.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
ONE_THREAD := OMP_NUM_THREADS=1
AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder
RUN := runs/mnist-$(shell date +%Y%m%d-%H%M%S)

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed  ## Make .venv with everything that CI uses

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

run: setup  ## Train a PIWAE on MNIST (about ten minutes on two cores) and test it
	$(BIN)/python -m lightning_iwae fit -c conf/mnist.yaml --trainer.default_root_dir $(RUN)
	$(BIN)/python -m lightning_iwae test -c conf/mnist.yaml --trainer.default_root_dir $(RUN) --ckpt_path best
	@echo "The run's files are in $(RUN)"

test: setup  ## The tests, two files at a time
	$(ONE_THREAD) $(BIN)/python -m pytest $(AT_A_TIME)

test-slow: setup  ## Long statistics, real data, clusters, servers, faults; two at a time
	$(ONE_THREAD) $(BIN)/python -m pytest $(AT_A_TIME) -m slow --timeout 1800

certify: setup  ## Check every estimator's expectation and write docs/estimators.md (a few minutes)
	$(BIN)/python -m lightning_iwae certify --out docs/estimators.md

bench: .venv-bench/installed  ## Measure speed and memory against others, write docs/performance.md (15 minutes)
	.venv-bench/bin/python -m benchmarks

.venv-bench/installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt torch numpy
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --editable . -r benchmarks/requirements.txt
	touch $@

check: setup  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: help setup run test test-slow certify bench check
