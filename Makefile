# Development commands of bASIC. `make` prints the list. Each target sets up what it needs, once.

BIN := .venv/bin
MODEL := smollm2-135m-instruct
# Prompts of `make bench`: MT-Bench questions if they are beside the checkout, else the examples.
BENCH_PROMPTS ?= $(firstword $(wildcard ../shared/data/mt_bench_dev.jsonl) examples/prompts.jsonl)

# Test processes that run at once, each with servers of its own.
SERVICE_PROCESSES ?= 4

# Faults that `make chaos` injects per database.
CHAOS_FAULTS ?= 50

# Write bytecode even if the caller's environment forbids it: without it every test process compiles torch and
# transformers again, which takes longer than most tests.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup model demo test check unit integration long chaos audit lock clients bench secrets clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.complete ## Create .venv and install everything into it

# The stamp is newer than its inputs, so that a second run has nothing to do.
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

# A process per core, a thread each. Tests with servers wait for most of their time, so they get more processes.
ON_CORES := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -p no:schemathesis
ON_SERVERS := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(SERVICE_PROCESSES) --dist loadscope --no-loadscope-reorder

unit: setup ## Run the quick tests, without servers
	$(ON_CORES) tests/unit -m 'not postgresql and not long'

integration: model ## Run the tests with real servers, processes and SmolLM2
	$(ON_CORES) tests/unit/storage -m 'postgresql and not long'
	$(ON_SERVERS) tests/acceptance tests/integration

long: model ## Run the laws that take longer than a change should wait for
	$(ON_SERVERS) tests/acceptance tests/integration tests/unit -m long

chaos: setup ## Inject faults into every part of the service, and check that no request is lost
	$(BIN)/python -m tests.chaos.run --database postgresql --faults $(CHAOS_FAULTS)
	$(BIN)/python -m tests.chaos.run --database sqlite --faults $(CHAOS_FAULTS)

audit: setup ## Check the pinned packages for known vulnerabilities; needs network access
	test -x .venv/audit/bin/pip-audit || { $(BIN)/python -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit; }
	.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

lock: setup ## Write requirements/*.txt, the hashed packages of the images, from constraints.txt; needs network access
	@sh .ci/lock

clients: model ## Try client libraries (instructor, langchain, pydantic-ai, chatlas …) on the service; needs network access
	test -x .venv/clients/bin/python || { $(BIN)/python -m venv .venv/clients && \
	  .venv/clients/bin/pip install -q instructor langchain-openai 'pydantic-ai-slim[openai]'; }
	test -x .venv/clients-responses/bin/python || { $(BIN)/python -m venv .venv/clients-responses && \
	  .venv/clients-responses/bin/pip install -q chatlas openbatch loguru && \
	  .venv/clients-responses/bin/pip install -q --no-deps autobatcher; }  # it asks for an older openai than chatlas
	$(BIN)/pytest -s tests/acceptance/test_client_libraries.py

bench: model ## Measure decoding against transformers' generate, at every batch size, mixed lengths, and the HTTP API; forty minutes
	$(BIN)/basic bench --prompts $(BENCH_PROMPTS)
	$(BIN)/basic bench --grid --prompts $(BENCH_PROMPTS) --max-tokens 48
	$(BIN)/python -m worker.bench.mixed_lengths --prompts $(BENCH_PROMPTS)
	$(BIN)/python -m jobs.bench.batch_api
	$(BIN)/python -m jobs.bench.streams

secrets: ## Write the passwords of docker-compose.yml, once
	@sh .ci/make-secrets

clean: ## Remove .venv and caches; the database of your jobs (.basic) stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
