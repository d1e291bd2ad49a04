# Two commands do all set-up on a fresh machine: `make quickstart` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
BIN := $(VENV)/bin
UV := .uv/bin/uv
# The CPU build of torch: from PIP_FIND_LINKS where this machine has it there, else from PyTorch's own index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_FROM := $(if $(wildcard $(PIP_FIND_LINKS)/torch-2.13.0+cpu-*),--find-links $(PIP_FIND_LINKS),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match)
PY ?= python3

.PHONY: setup quickstart test check docs docs-site bench bench-load bench-search clean
setup: $(VENV)/.ready ## install everything into .venv: varcas, vLLM's CPU build, the tools

$(UV):
	$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "varcas needs Python 3.11 or newer: make PY=python3.11 ...")'
	$(PY) -m venv .uv
	.uv/bin/pip install --quiet "uv>=0.11"

$(VENV)/.ready: pyproject.toml uv.lock $(UV)
	UV_PROJECT_ENVIRONMENT=$(VENV) $(UV) sync --frozen --quiet --python $(PY) --extra cpu --extra dev --inexact
	VIRTUAL_ENV=$(VENV) $(UV) pip install --no-config --quiet $(TORCH_FROM) "torch==2.13.0+cpu"
	touch $@

models/tiny-llama/config.json: experiments/make_model.py $(VENV)/.ready
	$(BIN)/python experiments/make_model.py tiny-llama models/tiny-llama

quickstart: $(VENV)/.ready models/tiny-llama/config.json ## real vLLM on this CPU: sweep, confirm, recommend
	$(BIN)/varcas sweep experiments/quickstart.yaml

test: $(VENV)/.ready ## everything, with real vLLM, Ray and Locust inside
	$(BIN)/python -m pytest -q tests/e2e
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/e2e

check: $(VENV)/.ready ## format, lint, types, layers, generated docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(UV) lock --check --quiet
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.ready ## write the generated pages anew
	$(BIN)/python docs/generate.py

docs-site: docs ## the documentation as a site, in site/; a broken link fails
	$(BIN)/zensical build --clean --strict

bench: $(VENV)/.ready ## varcas's own overhead: driver, pool, store
	$(BIN)/python benchmarks/driver_overhead.py
	$(BIN)/python benchmarks/store_append.py

bench-load: $(VENV)/.ready models/tiny-llama/config.json ## varcas's load beside `vllm bench serve` and GuideLLM; QUICK=1: 3 minutes
	-test -x .bench/guidellm/bin/guidellm || $(MAKE) .bench/guidellm/bin/guidellm
	PYTHONPATH=. $(BIN)/python benchmarks/load_client.py $(if $(QUICK),--quick)

bench-search: $(VENV)/.ready ## server starts until a search is within 3 % of the best, on recorded and simulated landscapes
	$(BIN)/python benchmarks/search.py

# in an environment of its own: it wants other versions of what varcas uses; without it, its rows say so
.bench/guidellm/bin/guidellm: $(UV)
	$(UV) venv --quiet --clear --python $(PY) .bench/guidellm
	VIRTUAL_ENV=.bench/guidellm $(UV) pip install --no-config --quiet "guidellm==0.8.1"

clean:
	rm -rf $(VENV) .uv .bench models .mypy_cache .ruff_cache .pytest_cache
