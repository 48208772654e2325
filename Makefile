# bASIC: everything a checkout can do. `make` alone prints this list. Each target sets up what it needs, once.

BIN := .venv/bin
MODEL := smollm2-135m-instruct
# What `make bench` decodes: MT-Bench questions if they lie beside the checkout, else our own prompts.
BENCH_PROMPTS ?= $(firstword $(wildcard ../shared/data/mt_bench_dev.jsonl) examples/prompts.jsonl)

.DEFAULT_GOAL := help
.PHONY: help setup model demo test check unit integration bench clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.complete ## Create .venv and install everything into it

# The stamp is younger than what it was made from, so that a second run has nothing to do.
.venv/.complete: pyproject.toml constraints.txt .ci/set-up
	@sh .ci/set-up
	@touch $@

model: setup ## Download and convert the embedded model, unless it is there
	@$(BIN)/basic models pull $(MODEL)

demo: model ## Run a real batch job on this machine and watch it
	@$(BIN)/python examples/demo.py

test: check unit integration ## Check style, types and imports, then run all tests

check: setup ## Check style, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: setup ## Run the tests that need no server
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit -n auto --dist worksteal  # a process a core, each with one thread

integration: model ## Run the tests with real servers, processes and SmolLM2
	$(BIN)/pytest tests/integration tests/acceptance

bench: model ## Measure decoding speed against transformers' own generate, then the front door
	$(BIN)/basic bench --prompts $(BENCH_PROMPTS)
	$(BIN)/python -m jobs.benchmark

clean: ## Remove .venv and caches; the record of your jobs (.basic) stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
