# Every target does its own set-up (.ci/set-up): makes .venv and installs this checkout, editable;
# done again only when the dependencies change. `make` alone lists the targets.
#
#   make train                                on the GPU or TPU if this machine has one, else the CPU
#   JAX_PLATFORMS=cuda make train             says it explicitly (cpu, cuda or tpu)
#   make train ARGS="--config.train.steps=100"      more flags for the program
#   make test ARGS="-k lightning -x"          more flags for pytest
#   make train PYTHON=/path/to/python3.13     which Python makes .venv (default: found, 3.12 or newer)

VENV ?= .venv
PY := $(VENV)/bin/python
ARGS ?=
JOBS ?= 2
export VENV

# jax is told its platform. Left alone it tries every plug-in that is installed, and the tests install
# those for CUDA and TPU to compile for them: on a machine without such a device jax then stops.
TPU := $(or $(wildcard /dev/accel[0-9]*),$(and $(wildcard /dev/vfio/[0-9]*),\
  $(shell grep -ls 0x1ae0 /sys/bus/pci/devices/*/vendor)))
ifneq ($(wildcard /dev/nvidia[0-9]*),)
JAX_PLATFORMS ?= cuda,cpu
else ifneq ($(TPU),)
JAX_PLATFORMS ?= tpu,cpu
else
JAX_PLATFORMS ?= cpu
endif
export JAX_PLATFORMS

# The drivers' libraries are large, so they are installed only where they are used.
comma := ,
DEVICE := $(if $(findstring cuda,$(JAX_PLATFORMS)),$(comma)cuda)$(if $(findstring tpu,$(JAX_PLATFORMS)),$(comma)tpu)
PYTEST := $(PY) -m pytest --durations=15
.DEFAULT_GOAL := help
.PHONY: help train train-long recall length-speed length-generalisation length-extrapolation test test-all test-fast test-gpu bench bench-gpu numerics lint format clean

help: ## print this list
	@echo "attnzoo (jax platform here: $(JAX_PLATFORMS))"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' Makefile

train: ## set up and train a small model for a few minutes; again: go on with it
	@.ci/set-up data$(DEVICE)
	$(PY) -m attnzoo.experiments.train --config=stdlib_small --extend=200 $(ARGS)

train-long: ## a larger model on the same text, about a quarter of an hour on 2 cores
	@.ci/set-up data$(DEVICE)
	$(PY) -m attnzoo.experiments.train --config=stdlib_long --extend=500 $(ARGS)

recall: ## train small models on a recall task and draw recall against state size
	@.ci/set-up data$(DEVICE)
	$(PY) -m attnzoo.experiments.recall_sweep $(ARGS)

length-speed: ## time one layer of RAT, of attention and of a recurrence against the length
	@.ci/set-up data$(DEVICE)
	$(PY) -m attnzoo.experiments.length_speed $(ARGS)

length-generalisation: ## train small models on short rows, measure their loss on longer ones
	@.ci/set-up data$(DEVICE)
	$(PY) -m attnzoo.experiments.length_generalisation $(ARGS)

length-extrapolation: ## the same for softplus attention, 16 times as long, with passkey retrieval
	@.ci/set-up data$(DEVICE)
	$(PY) -m attnzoo.experiments.length_extrapolation $(ARGS)

test: ## set up and run the tests that need no GPU
	@.ci/set-up test
	JAX_PLATFORMS=cpu $(PYTEST) -n $(JOBS) --dist worksteal -m "not (gpu or exhaustive)" $(ARGS)

test-all: ## the same and more variations of what they run
	@.ci/set-up test
	JAX_PLATFORMS=cpu $(PYTEST) -n $(JOBS) --dist worksteal -m "not gpu" $(ARGS)

test-fast: ## the quick tests: no slow ones, no compiling for absent accelerators
	@.ci/set-up test
	JAX_PLATFORMS=cpu $(PYTEST) -n $(JOBS) --dist worksteal -m "not (gpu or slow or exhaustive or tpu_aot or cuda_aot)" $(ARGS)

test-gpu: ## the tests that need an NVIDIA GPU
	@.ci/set-up test,cuda
	JAX_PLATFORMS=cuda,cpu $(PYTEST) -m gpu $(ARGS)

bench: ## time the operators on the CPU beside torch (torch is a download of gigabytes)
	@.ci/set-up data,bench
	JAX_PLATFORMS=cpu $(PY) -m attnzoo.experiments.benchmark $(ARGS)

bench-gpu: ## time the operators on an NVIDIA GPU beside torch
	@.ci/set-up data,bench,cuda
	JAX_PLATFORMS=cuda,cpu $(PY) -m attnzoo.experiments.benchmark $(ARGS)

numerics: ## write the report of each implementation's error against float64
	@.ci/set-up test
	JAX_PLATFORMS=cpu $(PY) -m attnzoo.experiments.numerics $(ARGS)

lint: ## check format, lint and types
	@.ci/set-up test,lint
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyrefly check

format: ## reformat and fix what ruff can fix
	@.ci/set-up test,lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv, builds and caches (runs/ with your results stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
