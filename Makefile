# One command per thing people do here, from a clean clone with only Python 3.11 or newer:
#   make demo   make test   make test-fast   make test-slow   make lint   make bench DEVICE=cpu   make wheel   make clean
# Each installs what it needs into .venv, once, with the versions in constraints.txt.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast test-slow lint bench tables wheel clean

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
DEVICE ?= cpu
WORKERS ?= 2
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INSTALLED := $(VENV)/.installed
NEEDS := pyproject.toml constraints.txt
# Two processes of one thread each beat one process of two here; more threads than cores make everything slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

help:
	@sed -n '2s/^#   //p' Makefile | sed 's/   */\n/g'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: a machine may hold only that wheel (the CPU build), and what follows keeps what is there.
$(INSTALLED)-torch: constraints.txt | $(BIN)/python
	@echo "installing torch"; $(BIN)/python -m pip --disable-pip-version-check install --quiet "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(INSTALLED)-base: $(NEEDS) $(INSTALLED)-torch
	@echo "installing lora_lite"; $(PIP) --editable '.[plot]'
	@touch $@

$(INSTALLED)-test: $(NEEDS) $(INSTALLED)-base
	@echo "installing what the tests need"; $(PIP) --editable '.[test]'
	@touch $@

$(INSTALLED)-bench: $(NEEDS) $(INSTALLED)-base
	@echo "installing what the benchmarks compare with"; $(PIP) --editable '.[bench]'
	@touch $@

$(INSTALLED)-dev: $(NEEDS) $(INSTALLED)-test
	@echo "installing the linters"; $(PIP) --editable '.[test,dev]'
	@touch $@

env: $(INSTALLED)-base

demo: $(INSTALLED)-base
	# Two OpenMP threads that spin while they wait slow each other down whenever anything else runs.
	OMP_WAIT_POLICY=passive $(BIN)/lora-lite demo $(ARGS)

test: $(INSTALLED)-test
	$(PYTEST) -n $(WORKERS) --dist loadgroup $(ARGS)

test-fast: $(INSTALLED)-test
	$(PYTEST) -n $(WORKERS) --dist loadgroup -m "fast and not slow" $(ARGS)

test-slow: $(INSTALLED)-test
	$(PYTEST) -n $(WORKERS) --dist loadgroup --timeout 3600 -m slow $(ARGS)

lint: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)-bench
	$(BIN)/python -m benchmarks --device $(DEVICE) $(ARGS)

tables: $(INSTALLED)-base
	$(BIN)/python -m lora_lite.table README.md docs/matrix.md

wheel: $(INSTALLED)-test
	$(BIN)/python -m hatchling build

clean:
	rm -rf $(VENV) dist out .pytest_cache .ruff_cache .hypothesis
	find lora_lite tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
