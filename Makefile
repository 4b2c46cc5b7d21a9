# Everything runs in a virtual environment of the project's own, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake metal mlx_fused python/src -type f) python/mlx_fused/_build.py.in
# A worker per CPU; one that has nothing left takes tests from the others.
WORKERS := --numprocesses auto --dist worksteal

.PHONY: help demo test coverage test-slow test-metal mac-report test-mlx-lm models metal-cost bench crossover sanitize docs linkcheck lint stubs wheels wheel-macos clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	@sh cmake/check_tools.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip==26.3

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@sh cmake/precompile_mlx.sh $(BIN)/python
	@touch $@

demo: $(VENV)/installed  ## Fine-tune a small model, stock and patched, and compare
	$(BIN)/mlx-fused demo

test: $(VENV)/installed sanitize  ## Run the tests
	$(BIN)/python -m pytest $(WORKERS) --durations=15

coverage: $(VENV)/installed  ## Run the Python tests, and list the lines of the package that they do not reach
	$(BIN)/python -m pytest $(WORKERS) --cov=python/mlx_fused --cov-report=term-missing

test-slow: $(VENV)/installed  ## Run the longer sweeps
	$(BIN)/python -m pytest $(WORKERS) -m slow

test-metal: $(VENV)/installed  ## Run the tests on this Mac's GPU, with Metal's validation layers on
	$(BIN)/python tests/metal_device

mac-report: $(VENV)/installed  ## Run all that only a Mac can answer, and pack it in build/mac-report.zip
	$(BIN)/python tests/metal_device/mac_report.py

test-mlx-lm: $(VENV)/installed  ## Run mlx-lm's own tests with every model patched: MLX_LM=<a checkout of mlx-lm>
	$(BIN)/python tests/run_mlx_lm_tests.py $(MLX_LM)

models: $(VENV)/installed  ## Compare every model of mlx-lm, stock and patched, and write docs/models.md
	PYTHONPATH=tests $(BIN)/python -m zoo

metal-cost: $(VENV)/installed  ## Count what the Metal kernels cost in an Apple GPU's instructions; needs packages of Debian 12
	PYTHONPATH=tests $(BIN)/python -m metal_cost

bench: $(VENV)/installed  ## Time whole models, stock and patched, and attention and the projections against MLX's and torch's: ARGS=--quick
	$(BIN)/python benchmarks/models.py $(ARGS)
	$(BIN)/python benchmarks/sdpa.py $(ARGS)
	$(BIN)/python benchmarks/loss.py $(ARGS)
	$(BIN)/python benchmarks/bench.py $(ARGS)

crossover: $(VENV)/installed  ## Time our kernels against MLX's on all that routing decides about: ARGS=--quick
	$(BIN)/python benchmarks/crossover.py $(ARGS)

sanitize: $(VENV)/installed  ## Test the C++ CPU path under ASan and UBSan (part of test)
	$(BIN)/cmake --fresh -S . -B build/sanitize -G Ninja "-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja" \
	  "-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python" -DMLX_FUSED_BUILD_PYTHON=OFF -DMLX_FUSED_BUILD_TESTS=ON \
	  -DCMAKE_CXX_FLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS"
	$(BIN)/cmake --build build/sanitize --parallel
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --parallel

docs: $(VENV)/installed  ## Build the documentation site in build/docs, and check its links
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going docs build/docs

linkcheck: $(VENV)/installed  ## Check the links of the documentation that lead to other sites
	$(BIN)/python -m sphinx -b linkcheck --fail-on-warning --keep-going docs build/linkcheck

lint: $(VENV)/bin/python  ## Check the formatting and style of all files
	$(BIN)/python -m pip install --quiet pre-commit==4.7.0
	$(BIN)/pre-commit run --all-files

stubs: $(VENV)/installed  ## Write the type stubs anew from the bindings
	$(BIN)/python -m nanobind.stubgen -q -m mlx_fused._ext -o python/mlx_fused/_ext.pyi

wheels: $(VENV)/bin/python  ## Build and test a wheel for every Python at hand: PYTHONS=<those alone>
	$(BIN)/python -m pip install --quiet --requirement release/requirements.txt
	$(BIN)/python release/wheels.py $(PYTHONS)

wheel-macos: $(VENV)/installed  ## Cross-build the wheel for macOS; it is not run
	$(BIN)/python tests/macos/wheel.py

clean:  ## Remove what the targets above made
	rm -rf $(VENV) build dist benchmarks/results mlx_fused_demo
