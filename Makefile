PYTHON ?= python3
BIN := .venv/bin
CSRC := $(wildcard csrc/*)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint wheel stamps bench

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

install: .venv/.installed ## create .venv and install segclip_fast in it, editable, with its tools

# Only csrc changed: rebuild the extension. Anything else: let pip resolve again. Nothing changed: no network needed.
.venv/.installed: pyproject.toml constraints.txt setup.py CMakeLists.txt $(CSRC)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(filter-out csrc/%,$?),$(BIN)/python -m pip install -c constraints.txt -e '.[dev]',$(REBUILD))
	@touch $@

REBUILD = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py build_ext --inplace

demo: install ## train a small model on generated scenes and write demo/
	$(BIN)/python -m segclip_fast.quickstart --output demo --overwrite

test: install ## the fast tests
	$(BIN)/python -m pytest

test-all: install ## also the slow tests
	$(BIN)/python -m pytest -m 'not gpu'

lint: install ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(CSRC))

wheel: install ## sdist and wheel in dist/, each tried in an empty environment
	rm -rf dist
	$(BIN)/python -m build
	PYTHON=$(BIN)/python bash tests/smoke_wheel.sh dist/*

stamps: ## the Tux Paint stamps (Debian package, 160 MB) in .stamps/, for the tests and runs that use them
	mkdir -p .stamps && cd .stamps && apt-get download tuxpaint-stamps-default
	dpkg -x .stamps/tuxpaint-stamps-default_*.deb .stamps

bench: install demo/report.json ## timings on this machine into benchmarks/results/ and the README
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-json=build/benchmarks.json
	$(BIN)/python benchmarks/report.py --benchmarks build/benchmarks.json --demo demo/report.json --readme README.md

demo/report.json:
	$(MAKE) demo
