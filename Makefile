# Every target sets itself up: a virtual environment in $(VENV), pinned by constraints.txt, made once.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
SETUP := constraints.txt pyproject.toml setup.py

# Tests start hundreds of processes: without its byte code each would compile torch's Python anew.
unexport PYTHONDONTWRITEBYTECODE

# One process a core, one thread each: networks this small gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# Real MNIST beside the checkout is used by the tests when it is there; the package knows no such path.
ifneq ($(wildcard ../shared/data/mnist),)
test test-slow: export VJVCR_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help setup train test test-slow check format aot bench bench-compare gpu gpu-paper has-gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.train: $(SETUP)
	@echo "setting up $(VENV) (first call only) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools ninja pybind11
	@$(PIP) --no-build-isolation --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@$(PIP) --no-build-isolation --editable '.[train,video,torchcodec,dali,simulate,dev]'
	@touch $@

setup: $(VENV)/.train  ## no more than the install that `make train` needs

train: $(VENV)/.train  ## pre-train, probe, decode: Table 1 (MovingMNIST) and figure 5; 5 minutes on two CPU cores
	@$(BIN)/vjvcr-fast reproduce table1 --dataset moving-mnist $(ARGS)

test: $(VENV)/.dev  ## the test suite; 5 minutes on two CPU cores
	$(PYTEST) -m "not slow and not aot" $(ARGS)

test-slow: $(VENV)/.dev  ## what needs longer; some 10 minutes
	$(PYTEST) -m "slow and not aot" $(ARGS)

check: $(VENV)/.dev  ## linter, formatter, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## format and fix in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

aot: $(VENV)/.dev  ## compile every kernel for GPUs that need not be there: registers, spills, tensor cores; 3 minutes
	$(BIN)/python -m pytest -m aot -s $(ARGS) tests/kernels/test_aot.py

bench: $(VENV)/.dev  ## benchmarks against the reference, some minutes; ARGS=--full: all of them, half an hour
	$(BIN)/python -m pytest benchmarks $(ARGS)

bench-compare: $(VENV)/.dev  ## REF=<commit>: its speed against the working tree's, run alternately; fails over 10%
	$(BIN)/python benchmarks/compare.py $(REF) --build $(ARGS)

# A GPU machine's own packages: of a virtual environment, which --system-site-packages does not reach, by parent.pth.
GPU_VENV := .venv-gpu
WITHOUT_GPU := tests/kernels/test_aot.py tests/kernels/test_interpreted.py
SANITIZED := tests/kernels/test_cuda_emulated.py -m cuda -k was_emulated
GPU := $(GPU_VENV)/bin/python
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

$(GPU_VENV)/.done: pyproject.toml setup.py | has-gpu
	@rm -rf $(GPU_VENV)
	@$(PYTHON) -m venv --system-site-packages --without-pip $(GPU_VENV)
	@$(PYTHON) -c '$(SITE)' >"$$($(GPU) -c '$(SITE)')/parent.pth"
	@$(GPU) -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-build-isolation --editable .
	@touch $@

has-gpu:
	@$(PYTHON) benchmarks/check_gpu.py

gpu gpu-paper: started := $(shell date +%s)
gpu: has-gpu $(GPU_VENV)/.done  ## on a CUDA machine, offline, with its own torch: all tests and benchmarks
	@failed=; log=$$(mktemp); at() { echo "make gpu: $$1 after $$(($$(date +%s) - $(started))) s"; }; \
	$(GPU) -m pytest -m "not slow" $(WITHOUT_GPU) >"$$log" 2>&1 & beside=$$!; \
	FAIL_WITHOUT_CUDA=1 $(GPU) -m pytest -m "not slow" $(WITHOUT_GPU:%=--ignore=%) $(ARGS) || failed="$$failed tests"; \
	at "tests on the GPU"; \
	wait $$beside || failed="$$failed tests-without-gpu"; \
	cat "$$log"; rm -f "$$log"; at "tests that need none, run beside them,"; \
	if command -v compute-sanitizer >/dev/null; then for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 9 $(GPU) -m pytest -q $(SANITIZED) || failed="$$failed $$tool"; \
	done; else echo "make gpu: there is no compute-sanitizer"; fi; at "sanitizers"; \
	$(GPU) -m pytest benchmarks || failed="$$failed benchmarks"; \
	at "all$${failed:+, failed:$$failed,}"; \
	test -z "$$failed"

# A piece of less than 8 minutes; Ctrl-C's signal, on which a run saves where it is.
PIECE ?= 440
gpu-paper: has-gpu $(GPU_VENV)/.done  ## on a CUDA machine, in pieces: the full Table 2 and figure 3; call it until it is done
	@for what in table2 fig3; do \
	  left=$$(($(PIECE) + $(started) - $$(date +%s))); test $$left -gt 0 || left=1; \
	  timeout --signal=INT $$left $(GPU) -m vjvcr_fast reproduce $$what --preset moving-mnist-stochastic $(ARGS); code=$$?; \
	  if test $$code -eq 124; then echo "make gpu-paper: not done yet; run the same command again"; fi; \
	  test $$code -eq 0 || exit $$code; \
	done

clean:  ## remove the virtual environments and caches; runs/ stays
	rm -rf $(VENV) $(GPU_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
