PYTHON ?= python3
BIN := .venv/bin
CSRC := $(wildcard csrc/*)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint wheel stamps bench gpu

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
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(CSRC)) tests/*.cpp

wheel: install ## sdist and wheel in dist/, each tried in an empty environment
	rm -rf dist
	$(BIN)/python -m build
	PYTHON=$(BIN)/python bash tests/smoke_wheel.sh dist/*

stamps: ## the Tux Paint stamps (Debian package, 160 MB) in .stamps/, for the tests and runs that use them
	mkdir -p .stamps && cd .stamps && apt-get download tuxpaint-stamps-default
	dpkg -x .stamps/tuxpaint-stamps-default_*.deb .stamps

bench: install demo/report.json ## timings of this machine's CPU into benchmarks/results/, the README and docs/performance.md
	mkdir -p build
	SEGCLIP_BENCH_DEVICE=cpu $(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-json=build/benchmarks.json
	$(BIN)/python benchmarks/flops.py
	$(BIN)/python benchmarks/superpixel_counts.py
	$(BIN)/python benchmarks/superpixel_agreement.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/report.py --benchmarks build/benchmarks.json --demo demo/report.json $(TABLES)

demo/report.json:
	$(MAKE) demo

# No .venv and no network: the machine's own Python, and beside it build/site, where the package is built with its
# CUDA part. PYTHONSAFEPATH keeps the checkout, which has no segclip_fast.kernels, from hiding the built package.
# WHEELS=folder: wheels of what that Python lacks; COMMIT: what the results name where there is no git.
COMMIT ?= $(shell git describe --always --dirty --abbrev=12 2>/dev/null)
PYTHON_BIN = $(abspath $(dir $(shell command -v $(PYTHON))))
GPU = PATH="$(CURDIR)/build/site/bin:$(PYTHON_BIN):$$PATH" PYTHONPATH="$(CURDIR)/build/site" PYTHONSAFEPATH=1 \
  COMMIT="$(COMMIT)" $(PYTHON)
PIP_OFFLINE = -m pip install --quiet --no-index --no-deps --upgrade --target build/site
TABLES = --readme README.md --performance docs/performance.md --superpixels docs/superpixels.md --refinement docs/refinement.md

# What takes time on a GPU machine is compiling kernels, one after the other. Tests run in parallel where pytest-xdist
# is there; then a smoke run of the benchmarks fills Triton's and Inductor's caches in parallel, so that the timed run,
# alone on the device, finds its kernels compiled. TESTS and BENCHES pick a part.
PARALLEL = $(shell $(PYTHON) -c "import os, xdist; print('-n', min(12, os.cpu_count()), '--dist worksteal')" 2>/dev/null)
OPS = $(addprefix benchmarks/bench_,$(addsuffix .py,attention attention_packed group_assign linear superpixel_kl))

TESTS ?= tests
BENCHES ?= benchmarks/

gpu: ## on a machine with a GPU, offline: CUDA build, GPU tests, benchmarks into benchmarks/results/<gpu>.json
	mkdir -p build/site
	$(if $(WHEELS),$(PYTHON) $(PIP_OFFLINE) $(WHEELS)/*.whl)
	$(GPU) benchmarks/harness/gpu_ready.py
	rm -rf build/lib* build/bdist*
	WITH_CUDA=on $(GPU) $(PIP_OFFLINE) --no-build-isolation .
	status=0; \
	$(GPU) -m pytest -m gpu $(PARALLEL) $(TESTS) || status=$$?; \
	$(if $(PARALLEL),SEGCLIP_BENCH_DEVICE=cuda SEGCLIP_BENCH_SMOKE=1 $(GPU) -m pytest $(PARALLEL) $(or $(filter $(OPS),$(BENCHES)),$(OPS)) > build/warm.log 2>&1;) \
	SEGCLIP_BENCH_DEVICE=cuda $(GPU) -m pytest $(BENCHES) --benchmark-only --benchmark-json=build/gpu.json || status=$$?; \
	COMMIT="$(COMMIT)" $(PYTHON) benchmarks/report.py --benchmarks build/gpu.json $(TABLES) && exit $$status
