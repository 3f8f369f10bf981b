# Two commands are enough: `make demo` and `make test`. Both set up .venv first.
#   SETUP=0 PYTHON=python3 make test     uses that Python and its packages, installs nothing
#   TORCH=cpu|cuda make setup            overrides the choice of the torch build
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo serve test test-gpu test-apt test-http soak lint type protos protos-check bench bench-record clean

SETUP ?= 1
ifeq ($(SETUP),0)
PYTHON ?= python3
PY := $(PYTHON)
# The package index may be out of reach.
FAST := not slow and not apt and not http and not net
else
# Relative, since the clone's path may hold spaces.
PY := .venv/bin/python
FAST := not slow and not apt and not http
endif

# As environment variables these survive quotes, dollars and spaces; make itself would expand a $.
override PROMPT := $(value PROMPT)
export PYTHON TORCH PROMPT MODEL TP ARGS
SOURCES := protos tpcomm worker coordinator lockstep bench deploy scripts tests

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: ## Make .venv and install pinned packages (done by the other targets as needed)
ifneq ($(SETUP),0)
	@scripts/setup.sh
endif

demo: setup ## A real model on two ranks answers PROMPT="..." through gRPC
	@$(PY) -m lockstep demo $${PROMPT:+"--prompt=$$PROMPT"} $${TP:+--tp "$$TP"}

serve: setup ## Serve MODEL=path-or-hub-id (default: the demo model) on TP=n ranks (default 1)
	@model="$${MODEL:-$$($(PY) -m lockstep.demo_model)}"; \
	exec $(PY) -m lockstep serve --model "$$model" --tp "$${TP:-1}" $${ARGS:-}

test: setup ## Unit and integration tests; those for GPUs are skipped where there are none
	@$(PY) -m pytest -m "$(FAST)" $${ARGS:-}

test-gpu: setup ## Tests that need GPUs
	@$(PY) -m pytest -m "gpu or multi_gpu" tests/gpu $${ARGS:-}

test-apt: setup ## Tests of the deployment: root, Debian's prometheus, systemd, iproute2
	@$(PY) -m pytest -m apt tests/apt $${ARGS:-}

test-http: setup ## Tests of the HTTP gateway; installs it and the openai client into .venv
ifneq ($(SETUP),0)
	@$(PY) -m pip install --quiet --constraint constraints/cpu.txt smg openai
endif
	@$(PY) -m pytest -m http tests/http $${ARGS:-}

soak: setup ## Slow tests: large checkpoints, long runs, the wheel in an empty environment
	@$(PY) -m pytest -m slow --timeout 1200 $${ARGS:-}

lint: setup ## ruff (rules and format), buf's rules and its look for breaking changes
	@$(PY) -m ruff check $(SOURCES)
	@$(PY) -m ruff format --check $(SOURCES)
	@$(PY) scripts/protos.py lint
	@$(PY) scripts/protos.py breaking

type: setup ## mypy --strict
	@$(PY) -m mypy $(SOURCES)

protos: setup ## Generate protos/**/*_pb2*.py with the oldest tools we support
	@$(PY) scripts/protos.py generate

protos-check: setup ## Fail if the generated code differs from what the .proto files give
	@$(PY) scripts/protos.py check

bench: setup ## Benchmarks: ARGS="serving --model ..." (see `lockstep bench --help`)
	@$(PY) -m lockstep bench $${ARGS:-}

bench-record: setup ## All figures of TP=n ranks, within 12 minutes, into bench/results (needs n GPUs)
	@$(PY) -m lockstep bench record --tp "$${TP:-1}" $${ARGS:-}

clean: ## Remove caches and build outputs, not .venv
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
