# make demo   build lomem in a virtual environment and run the demo
# make test   the same, then ctest and pytest
#
# Variables: PYTHON (3.10 or newer), TORCH (what pip installs as torch), PIP_ARGS (further arguments for that,
# such as --pre or an index), VENV (without spaces), JOBS.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
VENV ?= .venv
JOBS ?= 2

# A relative path: the checkout's own may hold spaces.
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin:$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PRE_COMMIT_HOME ?= $(CURDIR)/build/pre-commit

# The oldest CMake that lomem says it works with: consumer projects are tested with it.
OLDEST_CMAKE := 3.22

.PHONY: help demo test install ctest pytest types asan asan-pytest dev lint format gtest clean FORCE

help:
	@sed -n '1,5p' Makefile

demo: install
	$(BIN)/lomem demo

test: ctest pytest

# Changes when TORCH does.
$(VENV)/.torch-requirement: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH) $(PIP_ARGS)' | cmp -s - $@ || echo '$(TORCH) $(PIP_ARGS)' > $@

# torch first, by itself: whatever else asks for torch then finds it there.
$(VENV)/.torch: $(VENV)/.torch-requirement
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lomem needs Python 3.10 or newer, PYTHON is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet $(PIP_ARGS) '$(TORCH)'
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

build/oldest-cmake/.done: $(VENV)/.torch Makefile
	$(PIP) install --quiet --upgrade --target build/oldest-cmake 'cmake==$(OLDEST_CMAKE).*'
	touch $@

CONFIGURE = cmake -DTorch_DIR="$$($(BIN)/python cmake/lomem_torch.py)" --preset

ctest: $(VENV)/.tools gtest build/oldest-cmake/.done
	$(CONFIGURE) release -DLOMEM_CONSUMER_CMAKE="$(CURDIR)/build/oldest-cmake/cmake/data/bin/cmake"
	cmake --build --preset release
	ctest --preset release -j $(JOBS)

pytest: install
	$(BIN)/python -m pytest -q -n $(JOBS)

# From another folder, so that the installed package is checked.
types: install
	cd tests && mypy --config-file ../pyproject.toml

asan dev: $(VENV)/.tools gtest
	$(CONFIGURE) $@
	cmake --build --preset $@
	ctest --preset $@ -j $(JOBS)

# The ops' Python tests, with the library under the sanitizers: random arguments and random codes read and write in
# bounds. (gcc: its run-time libraries must be loaded before Python's.)
SANITIZERS := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
library = $$($${CXX:-c++} -print-file-name=$(1))
asan-pytest: $(VENV)/.tools
	$(PIP) install --quiet --no-build-isolation --no-deps --upgrade --target build/asan-python \
	  -C build-dir=build/asan-wheel -C cmake.build-type=Debug -C cmake.define.CMAKE_CXX_FLAGS="$(SANITIZERS)" .
	PYTHONPATH=build/asan-python ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$(call library,libasan.so) $(call library,libubsan.so) $(call library,libstdc++.so.6)" \
	  $(BIN)/python -m pytest -q -p no:cacheprovider tests/python/test_errors.py tests/python/test_packing.py \
	  tests/python/test_step_backward.py tests/python/test_step_activations.py tests/python/test_norms.py

lint: $(VENV)/.tools
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.tools
	-$(BIN)/pre-commit run --all-files

clean:
	rm -rf build $(VENV)
