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

# Of a wheel, so that it works on other machines: with the tag of the oldest glibc, and none of torch's libraries inside.
REPAIR := auditwheel repair --exclude "libtorch*" --exclude "libc10*"

.PHONY: help setup train test test-slow check format docs aot bench bench-compare wheel sdist has-gpu clean
.PHONY: gpu gpu-smoke gpu-bench gpu-test gpu-sanitize gpu-memcheck gpu-racecheck gpu-paper

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.train: $(SETUP)
	@echo "setting up $(VENV) (first call only) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools pybind11
	@$(PIP) --no-build-isolation --editable '.[train]'
	@touch $@

# Only what the extras need: the package is installed, and naming its folder would compile the operators again.
$(VENV)/.dev: $(VENV)/.train
	@$(PIP) 'vjvcr_fast[train,wandb,examples,video,torchcodec,dali,simulate,hub,docs,dev]'
	@touch $@

setup: $(VENV)/.train  ## no more than the install that `make train` needs

train: $(VENV)/.train  ## pre-train, probe, decode: Table 1 (MovingMNIST) and figure 5; 5 minutes on two CPU cores
	@$(BIN)/vjvcr-fast reproduce table1 --dataset moving-mnist --results off $(ARGS)

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

docs: $(VENV)/.dev  ## the documentation site, in site/; a link that leads nowhere fails
	$(BIN)/mkdocs build --strict

aot: $(VENV)/.dev  ## compile every kernel for GPUs that need not be there: registers, spills, tensor cores; 3 minutes
	$(BIN)/python -m pytest -m aot -s $(ARGS) tests/kernels/test_aot.py

wheel: $(VENV)/.dev  ## into dist/: a wheel with the compiled operators, with CUDA's if there is an nvcc; 2 minutes
	@rm -rf build
	@$(BIN)/python -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir build/wheel
	@PATH="$(abspath $(BIN)):$$PATH" $(REPAIR) --wheel-dir dist build/wheel/*.whl

sdist: $(VENV)/.dev  ## into dist/: the sources, from which pip can build
	@$(BIN)/python setup.py --quiet sdist
	@ls dist/*.tar.gz

bench: $(VENV)/.dev  ## benchmarks against the reference, a quarter of an hour; ARGS=--full: all of them, an hour
	$(BIN)/python -m pytest benchmarks $(ARGS)

bench-compare: $(VENV)/.dev  ## REF=<commit>: its speed against the working tree's, run alternately; fails over 10%
	$(BIN)/python benchmarks/compare.py $(REF) --build $(ARGS)

# -- On a CUDA machine: offline, with its own torch. A target that fails or ends at its limit does not stop the next. --
ifneq ($(filter gpu gpu-%,$(MAKECMDGOALS)),)
MAKEFLAGS += --keep-going
.NOTPARALLEL:
endif

# What every target leaves goes to GPU_OUT, but the figures of gpu-bench to GPU_RESULTS.
GPU_OUT ?= runs/gpu
GPU_RESULTS ?= benchmarks/results

# The machine's own packages: of a virtual environment, which --system-site-packages does not reach, by parent.pth.
GPU_VENV := .venv-gpu
GPU := $(GPU_VENV)/bin/python
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
GPU_INSTALL := $(GPU) -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-build-isolation

$(GPU_VENV)/.done: pyproject.toml setup.py vjvcr_fast/native_build.py $(wildcard csrc/*) | has-gpu
	@rm -rf $(GPU_VENV)
	@$(PYTHON) -m venv --system-site-packages --without-pip $(GPU_VENV)
	@$(PYTHON) -c '$(SITE)' >"$$($(GPU) -c '$(SITE)')/parent.pth"
	@VJVCR_CUDA=$${VJVCR_CUDA:-1} timeout 300 $(GPU_INSTALL) --editable . || \
	  { echo "make gpu: the operators could not be built for CUDA"; VJVCR_CUDA=0 $(GPU_INSTALL) --editable .; }
	@touch $@

has-gpu:
	@$(PYTHON) benchmarks/check_gpu.py

# Seconds.
LIMIT_smoke := 60
LIMIT_bench := 240
LIMIT_test := 480
LIMIT_memcheck := 180
LIMIT_racecheck := 180

# $(call stage,NAME,COMMAND): runs it for LIMIT_NAME seconds at most, and says how it ended. What it prints also goes to
# gpu-NAME.txt. At the limit it gets Ctrl-C's signal, and ten seconds later it is killed.
gpu-%: SHELL := bash
gpu-%: export PYTHONUNBUFFERED := 1
define stage
@mkdir -p $(GPU_OUT); \
log=$(GPU_OUT)/gpu-$(1).txt; \
timeout --signal=INT --kill-after=10 $(LIMIT_$(1)) $(2) 2>&1 | tee $$log; code=$${PIPESTATUS[0]}; \
case $$code in 0) how=passed;; 124|137) how="stopped at its limit";; *) how="failed (exit code $$code)";; esac; \
echo "make gpu-$(1): $$how after $$SECONDS s of $(LIMIT_$(1)); see $$log" | tee -a $$log; \
exit $$code
endef

gpu: gpu-smoke gpu-bench gpu-test gpu-sanitize  ## on a CUDA machine, offline, with its own torch: all of the next four

gpu-smoke: has-gpu $(GPU_VENV)/.done  ## builds; every operator once, against the reference; at most 1 minute
	$(call stage,smoke,$(GPU) benchmarks/smoke.py $(GPU_OUT)/gpu-smoke.json)

# Tests that would begin in the last 40 seconds are left out.
GPU_BENCH := $(addprefix benchmarks/bench_,losses_cuda.py latents.py host.py training.py sigreg_cuda.py)
gpu-bench: has-gpu $(GPU_VENV)/.done  ## measures the targets, what matters most first; at most 4 minutes
	$(call stage,bench,$(GPU) -m pytest -s --tb=short --continue-on-collection-errors --results=$(GPU_RESULTS) \
	  --seconds=$$(($(LIMIT_bench) - 40)) $(GPU_BENCH) $(ARGS))

# Eight processes share the GPU; those tests come first. Not those of Triton's interpreter, which needs an older numpy.
gpu-test: has-gpu $(GPU_VENV)/.done  ## the test suite, what needs the GPU first; at most 8 minutes
	@$(PYTHON) benchmarks/check_gpu.py hypothesis xdist
	$(call stage,test,env FAIL_WITHOUT_CUDA=1 OMP_NUM_THREADS=1 $(GPU) -m pytest -v --tb=short -n 8 --maxschedchunk=1 \
	  --continue-on-collection-errors -m "not slow and not aot" --ignore=tests/kernels/test_interpreted.py $(ARGS))

SANITIZED := tests/kernels/test_cuda_emulated.py::TestOnAGPU::test_it_is_what_was_emulated \
  tests/latents/test_operators.py::test_both_devices_round_alike \
  tests/kernels/test_triton.py::TestNumbers::test_terms_on_their_own \
  tests/kernels/test_triton_sigreg.py::TestSurroundings::test_a_sequence_is_its_concatenation
gpu-sanitize: gpu-memcheck gpu-racecheck  ## compute-sanitizer's memcheck and racecheck on a few tests; 3 minutes each
gpu-memcheck gpu-racecheck: gpu-%: has-gpu $(GPU_VENV)/.done
	$(call stage,$*,env FAIL_WITHOUT_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  compute-sanitizer --tool $* --error-exitcode 9 $(GPU) -m pytest -v -p no:xdist $(SANITIZED))

# A piece of less than 8 minutes; Ctrl-C's signal, on which a run saves where it is.
PIECE ?= 440
gpu-paper: started := $(shell date +%s)
gpu-paper: has-gpu $(GPU_VENV)/.done  ## on a CUDA machine, in pieces: the full Table 2 and figure 3; call it until it is done
	@for what in table2 fig3; do \
	  left=$$(($(PIECE) + $(started) - $$(date +%s))); test $$left -gt 0 || left=1; \
	  timeout --signal=INT $$left $(GPU) -m vjvcr_fast reproduce $$what --preset moving-mnist-stochastic $(ARGS); code=$$?; \
	  if test $$code -eq 124; then echo "make gpu-paper: not done yet; run the same command again"; fi; \
	  test $$code -eq 0 || exit $$code; \
	done

clean:  ## remove the virtual environments and caches; runs/ stays
	rm -rf $(VENV) $(GPU_VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
