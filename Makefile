# make demo   build lomem in a virtual environment and run the demo
# make test   the same, then ctest and pytest
#
# Variables: PYTHON (3.10 or newer), TORCH (what pip installs as torch), VENV, JOBS.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PRE_COMMIT_HOME ?= $(abspath build/pre-commit)

.PHONY: demo test install ctest pytest types asan lint format gtest clean help

help:
	@sed -n '1,4p' Makefile

demo: install
	$(BIN)/lomem demo

test: install
	$(MAKE) ctest pytest

# torch first, by itself: whatever else asks for torch then finds it there.
$(VENV)/.torch: Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lomem needs Python 3.10 or newer, PYTHON is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet '$(TORCH)'
	touch $@

$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --group build --group test --group lint
	touch $@

# Always: pip cannot tell whether the sources changed. The build folder under build/ makes it quick.
install: $(VENV)/.tools
	$(PIP) install --quiet --no-build-isolation '.[demo]'

# GoogleTest: the installed one, else Debian's package where apt and root allow it, else CMake downloads it.
gtest:
	@if ! echo '#include <gtest/gtest.h>' | $${CXX:-c++} -x c++ -fsyntax-only - 2>/dev/null \
	    && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && apt-get install -y -qq libgtest-dev >/dev/null || true; \
	fi

ctest: $(VENV)/.tools gtest
	cmake --preset release -DTorch_DIR="$$($(BIN)/python cmake/lomem_torch.py)"
	cmake --build --preset release
	ctest --preset release -j $(JOBS)

pytest: install
	$(BIN)/python -m pytest -q -n $(JOBS)

# From another folder, so that the installed package is checked.
types: install
	cd tests && $(BIN)/mypy --config-file ../pyproject.toml

asan: $(VENV)/.tools gtest
	cmake --preset asan -DTorch_DIR="$$($(BIN)/python cmake/lomem_torch.py)"
	cmake --build --preset asan
	ctest --preset asan -j $(JOBS)

lint: $(VENV)/.tools
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.tools
	-$(BIN)/pre-commit run --all-files

clean:
	rm -rf build $(VENV)
