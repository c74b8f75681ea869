# Every verb sets up its own environment, so that on a fresh machine any one of them is the only
# command needed. Beforehand: Python >= 3.11 with venv, and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests wait for processes that they start, so there is work for more of them than cores.
JOBS ?= 3
# Folder of musk1.npz, fox.npz and alt_atheism.npz, for `make bench`; they are not shipped.
MIL_DATA ?=

.DEFAULT_GOAL := help

help: ## show the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"bagscope needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Name another one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,demo]'
	@touch $@

install: $(READY) ## make the virtual environment

demo: $(READY) ## synthetic slides through the whole line, into ./demo
	$(BIN)/bagscope demo demo

fmt: $(READY) ## format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell bagscope tests benchmarks docs examples README.md CONTRIBUTING.md CHANGELOG.md
	$(BIN)/mypy

check: lint ## lint, types and the tests without coverage
	$(BIN)/python -m pytest -q -m 'not slow and not gpu and not network' -n $(JOBS) --dist worksteal

test: $(READY) ## the tests; under ten minutes on two cores
	$(BIN)/python -m pytest -m 'not slow and not network' -n $(JOBS) --dist worksteal

coverage: $(READY) ## the same tests with their coverage, which takes a fifth longer
	$(BIN)/python -m pytest -m 'not slow and not network' -n $(JOBS) --dist worksteal --cov --cov-report=
	$(BIN)/coverage report --skip-covered --sort=cover
	$(BIN)/coverage report --include='bagscope/wsi/*,bagscope/cohort/*,bagscope/features/*,bagscope/artifacts.py' --fail-under=90 --format=total

test-slow: $(READY) ## the tests that take long
	$(BIN)/python -m pytest -m 'slow and not network' -n $(JOBS) --dist worksteal

test-gpu: $(READY) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(READY) ## benchmarks; correctness first, results into benchmarks/
	$(BIN)/python benchmarks/bench_reading.py
	$(BIN)/python benchmarks/bench_tiling.py
	$(BIN)/python benchmarks/bench_cohort.py
	$(BIN)/python benchmarks/bench_extract.py
	$(BIN)/python benchmarks/bench_store.py
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_attention.py
	$(BIN)/python benchmarks/bench_scan.py
	$(BIN)/python benchmarks/bench_transmil.py
	$(BIN)/python benchmarks/bench_training.py
	$(BIN)/python benchmarks/bench_planted.py
	$(BIN)/python benchmarks/bench_packmil.py
	$(BIN)/python benchmarks/bench_heatmaps.py
	$(BIN)/python benchmarks/bench_scoring.py
	$(BIN)/python benchmarks/demo_quality.py
	test -z "$(MIL_DATA)" || $(BIN)/python benchmarks/classic_mil.py "$(MIL_DATA)"

zoo: $(READY) ## every recipe on the same tasks, and its cost; resumes, three hours at most
	$(BIN)/python benchmarks/zoo.py $(if $(MIL_DATA),--mil-data "$(MIL_DATA)") $(if $(wildcard demo/study),--demo demo/study)

bench-gpu: $(READY) ## the kernels' tests and benchmarks on a CUDA device, a few minutes
	$(BIN)/python -m pytest -m gpu tests/kernels
	$(BIN)/python benchmarks/bench_kernels.py --device cuda --compile --record
	$(BIN)/python benchmarks/bench_gpu.py --compile --record

drill: $(READY) ## kill runs and resume; damage files and find it; train on noise
	$(BIN)/python benchmarks/drill.py --kills 200
	$(BIN)/python benchmarks/drill.py --stage extract --kills 100
	$(BIN)/python benchmarks/drill.py --stage train --kills 20
	$(BIN)/python benchmarks/drill_verify.py --damages 200
	$(BIN)/python benchmarks/canary.py --seeds 20

golden: $(READY) ## write the golden files of tests/golden anew (a change wants a changelog line)
	$(BIN)/python tests/golden/make.py

docs: $(READY) ## check the docs: links, verbs, options, and that commands and examples run
	$(BIN)/python -m pytest -q -m 'not network' tests/test_docs.py tests/test_docs_run.py

clean: ## remove the environment and everything that a verb made
	rm -rf $(VENV) demo build dist *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis

.PHONY: help install demo fmt lint check test coverage test-slow test-gpu bench zoo bench-gpu drill golden docs clean
