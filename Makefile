# One virtual environment, .venv, made from pinned files; every target that needs it makes it first.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FUZZER := $(VENV)/.fuzzer
PYTHONS := $(PYTHON) python3.11 python3.12 python3.13 python3

# pip separates its find-links by spaces, uv by commas: wheels that pip knows of, uv finds too.
empty :=
comma := ,
ifneq ($(strip $(PIP_FIND_LINKS)),)
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
endif

# torch's CPU build is not in the ordinary index. `--torch-backend cpu` makes uv look where PyTorch keeps it; with
# find-links the plain call comes first, for a machine that has the wheel but does not reach that place.
cpu_torch = $(if $(UV_FIND_LINKS),$(1) || )$(1) --torch-backend cpu

UV := $(BIN)/uv
COMPILE := $(UV) pip compile --quiet --no-annotate --custom-compile-command "make lock" --python-version 3.11 $(LOCK_ARGS)
LINUX := --python-platform x86_64-manylinux_2_28
NO_VISION := --override requirements/overrides.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint check docs upstream fuzz fuzzer lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make .venv: vLLM for a CPU, the tools, and mdl itself, editable (2.5 GB)

$(UV):
	@test -x $(BIN)/python || for python in $(PYTHONS); do \
		if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
		fi; \
	done
	@test -x $(BIN)/python || { echo "mdl needs Python 3.11 or later with its venv module: make setup PYTHON=..." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint requirements/dev.txt uv

$(READY): requirements/dev.txt pyproject.toml | $(UV)
	$(call cpu_torch,$(UV) pip install --python $(BIN)/python --no-deps --requirement requirements/dev.txt)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY) ## inspect, convert, verify and serve the checkpoint in examples/moby_dick
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh

test: $(READY) ## run the tests, two at a time; make test ARGS="-k plan" runs some of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: $(READY) ## ruff (rules and format) and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(READY) ## put what the program really prints into README.md and docs/ (minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docs/refresh.py

upstream: $(READY) ## add litgpt, torchtune, mistral-inference and others to .venv, for the tests that run their code
	$(UV) pip install --python $(BIN)/python --no-deps --requirement requirements/upstream.txt

fuzzer: $(FUZZER)

$(FUZZER): requirements/fuzz.txt $(READY)
	$(UV) pip install --python $(BIN)/python --no-deps --requirement requirements/fuzz.txt
	@touch $@

# Inputs are kept in build/fuzz, so that a later run goes on where this one stopped.
TARGETS ?= unpickle torch_zip legacy safetensors dcp_metadata mapping inventory
SECONDS ?= 60

fuzz: $(FUZZER) ## fuzz every reader for a minute; make fuzz TARGETS=legacy SECONDS=3600 one of them for an hour
	$(BIN)/python tests/fuzz/seeds.py build/fuzz
	@for target in $(TARGETS); do \
		$(BIN)/python tests/fuzz/harness.py $$target build/fuzz/$$target -dict=build/fuzz/words -max_len=8192 \
			-timeout=10 -rss_limit_mb=2048 -max_total_time=$(SECONDS) -artifact_prefix=build/fuzz/$$target- \
			-print_final_stats=1 $(ARGS) || exit; \
	done

check: lint test ## lint and test: what has to pass before a commit

lock: $(UV) ## compile requirements/*.in; make lock LOCK_ARGS=--upgrade takes the newest releases
	$(call cpu_torch,$(COMPILE) $(LINUX) $(NO_VISION) requirements/dev.in --output-file requirements/dev.txt)
	$(call cpu_torch,$(COMPILE) $(LINUX) $(NO_VISION) -c requirements/dev.txt requirements/cpu.in --output-file requirements/cpu.txt)
	$(COMPILE) --universal -c requirements/dev.txt requirements/convert.in --output-file requirements/convert.txt
	$(COMPILE) $(LINUX) -c requirements/dev.txt requirements/fuzz.in --output-file requirements/fuzz.txt
	env -u UV_FIND_LINKS $(COMPILE) $(LINUX) -c requirements/convert.txt requirements/gpu.in --output-file requirements/gpu.txt

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
