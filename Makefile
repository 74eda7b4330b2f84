# Two commands for a newcomer:  make demo   (set-up, then train, test and label a synthetic room)
#                               make test   (set-up, then the tests)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := las,plots,logging,h5,mesh,baseline,dev

.PHONY: help setup demo test test-slow test-gpu sanitize lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## create .venv with everything the demo and the tests need

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard pc3d/csrc/*)
	@sh tools/system_packages.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[viewer]" || \
	  echo "setup: Open3D has no wheel for this Python; the window viewer is off, pictures are still rendered"
	@$(BIN)/python tools/check_install.py
	@touch $@

demo: setup  ## train SparseUNet-small on synthetic rooms, test it, label a cloud, draw pictures (about 8 minutes on 2 cores)
	$(BIN)/python tools/demo.py

test: setup  ## run the tests (slow and GPU tests have their own targets)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: setup  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

sanitize: setup  ## run the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tools/sanitize.py

lint: setup  ## formatting, style, types and the import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## time the kernels beside their peers
	$(BIN)/python tools/bench.py --help

clean:  ## remove builds and caches (keeps runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
