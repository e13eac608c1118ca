# Needs only Python 3.11+ and make. `make demo` is the place to begin.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: help demo test test-stalls test-all check format docs bench binary lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# The set-up has two depths: what the daemon needs to run, and what its developers need on top.
$(VENV)/.runtime: requirements/runtime.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "comfyd needs Python 3.11 to 3.13; this is " + sys.version.split()[0] + ". Choose another with: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r requirements/build.txt
	$(PIP) install --require-hashes --no-build-isolation -r requirements/runtime.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.txt
	$(PIP) install --require-hashes --no-build-isolation -r requirements/dev.txt
	@touch $@

demo: $(VENV)/.runtime  ## set up, start the daemon with its small engine, run a prompt, show the picture, stop
	@$(BIN)/comfyd demo

# By files: what a file's tests share (a daemon, an S3 server) is started once.
TESTING := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: $(VENV)/.dev  ## set up and run the tests
	$(TESTING)

test-stalls: $(VENV)/.dev  ## the tests, failing where our code holds its loop up for 50 ms
	$(TESTING) -p stall_guard_plugin

check: $(VENV)/.dev  ## ruff (lint and format), mypy --strict, flake8-async
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/flake8 comfyd tests benchmarks
	$(BIN)/python docs/generate.py --check

format: $(VENV)/.dev  ## format and apply safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-all:  ## the tests on each supported Python that this machine has
	@PYTHON=$(PYTHON) ./tests/run_all_pythons

docs: $(VENV)/.runtime  ## write into docs/ what comes from the code
	$(BIN)/python docs/generate.py

bench: $(VENV)/.dev  ## speed and memory, as ratios against a raw client
	$(BIN)/python -m benchmarks

# In a virtual environment of its own, or what developers install would be found and gathered too.
BINARY := build/binary
binary: $(BINARY)/.packages  ## build dist/comfyd: one file that needs no Python (needs a C compiler and binutils)
	PYTHONHASHSEED=0 $(BINARY)/venv/bin/python -m PyInstaller --noconfirm --log-level ERROR --distpath $(BINARY) --workpath $(BINARY)/work packaging/comfyd.spec
	$(BINARY)/venv/bin/python packaging/pack.py $(BINARY)/comfyd dist/comfyd

$(BINARY)/.packages: requirements/build.txt requirements/runtime.txt packaging/requirements.txt
	$(PYTHON) -m venv --clear $(BINARY)/venv
	$(BINARY)/venv/bin/python -m pip install --quiet --require-hashes -r requirements/build.txt
	$(BINARY)/venv/bin/python -m pip install --quiet --require-hashes --no-build-isolation -r requirements/runtime.txt
	$(BINARY)/venv/bin/python -m pip install --quiet --require-hashes -r packaging/requirements.txt
	@touch $@

lock: pyproject.toml  ## write requirements/*.txt anew from pyproject.toml (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate pyproject.toml -o requirements/runtime.txt
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --group dev pyproject.toml -o requirements/dev.txt
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -c requirements/build.txt packaging/requirements.in -o packaging/requirements.txt
	printf 'hatchling==1.33.0\neditables==0.6\nsetuptools==80.9.0\nwheel==0.45.1\npkgconfig==1.5.5\n%s\n' "$$(grep -o '^cffi==[0-9.]*' requirements/runtime.txt)" | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate - -o requirements/build.txt

clean:  ## remove what the set-up made
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache dist build
