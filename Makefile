# bASIC: everything a checkout can do. `make` alone prints this list. Each target sets up what it needs, once.

BIN := .venv/bin
MODEL := smollm2-135m-instruct
# What `make bench` decodes: MT-Bench questions if they lie beside the checkout, else our own prompts.
BENCH_PROMPTS ?= $(firstword $(wildcard ../shared/data/mt_bench_dev.jsonl) examples/prompts.jsonl)

# So many faults strike on each database.
CHAOS_FAULTS ?= 50

# Whoever starts torch keeps its bytecode, whatever the caller's environment says: else every process of a test compiles
# torch and transformers anew, which takes longer than most of what is tested.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup model demo test check unit integration chaos audit bench secrets clean

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

unit: setup ## Run the quick tests: none of our processes, and PostgreSQL out of a wheel beside SQLite
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit -n auto --dist worksteal  # a process a core, each with one thread

integration: model ## Run the tests with real servers, processes and SmolLM2
	$(BIN)/pytest tests/integration tests/acceptance

chaos: setup ## Break every part of the service, again and again, and check that nothing is lost
	$(BIN)/python -m tests.chaos.run --database postgresql --faults $(CHAOS_FAULTS)
	$(BIN)/python -m tests.chaos.run --database sqlite --faults $(CHAOS_FAULTS)

audit: setup ## Look for known holes in what constraints.txt pins; needs a reachable vulnerability service
	test -x .venv/audit/bin/pip-audit || { $(BIN)/python -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit; }
	.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

bench: model ## Measure decoding against transformers' generate, at every batch size, and the front door; forty minutes
	$(BIN)/basic bench --prompts $(BENCH_PROMPTS)
	$(BIN)/basic bench --grid --prompts $(BENCH_PROMPTS) --max-tokens 48
	$(BIN)/python -m jobs.bench.batch_api
	$(BIN)/python -m jobs.bench.streams

secrets: ## Write the passwords of docker-compose.yml, once
	@sh .ci/make-secrets

clean: ## Remove .venv and caches; the record of your jobs (.basic) stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
