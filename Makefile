# Everything here starts from Python 3.11 or later, pip and a package registry; nothing else is needed.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin

.PHONY: demo test check lowest clients soak mutation lint bench clean

# The environment is rebuilt when the project's dependencies change.
.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or later, expected one (make PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	touch $@

demo: .venv/ready
	$(BIN)/pagellm generate --chat --max-tokens 48 \
		"Who wrote Romeo and Juliet?" \
		"Why is the sky blue? Answer in one sentence." \
		"Write a haiku about the sea."
	$(BIN)/pagellm replay examples/traces/azure_2023_conversation.csv --roofline l4,smollm2-135m

test: .venv/ready
	$(BIN)/python -m pytest

# What computes, with every access checked against its array: a wrong index ends the run with its numbers.
check: .venv/ready
	PAGELLM_CHECK=1 $(BIN)/python -m pytest --capture=no --hypothesis-profile=quick tests/kernels \
		tests/engine/test_numerics.py tests/engine/test_architectures.py --ignore tests/kernels/test_instruction_sets.py

# The lowest Numba that pyproject.toml admits, in an environment of its own; .venv has the newest.
LOWEST_NUMBA := $(shell sed -n 's/.*"numba>=\([0-9.]*\)".*/\1/p' pyproject.toml)
lowest: .venv/ready
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --editable '.[test]' 'numba==$(LOWEST_NUMBA).*'
	.venv-lowest/bin/python -m pytest tests/kernels/test_jit.py tests/engine/test_numerics.py

# Clients and suites of others against the server, in an environment of their own.
clients: .venv/ready
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --disable-pip-version-check llm 'lm_eval[api]' schemathesis vllm-router
	PAGELLM_CLIENTS=.venv-clients/bin $(BIN)/python -m pytest tests/engine/server/test_suites.py tests/engine/server/test_routing.py

# More of the property-based tests, with fresh seeds: make soak SECONDS=3600
SECONDS ?= 60
soak: .venv/ready
	$(BIN)/python -m tests.properties.soak --seconds $(SECONDS)

# Bugs seeded into the scheduler and the block manager, one at a time: do the tests notice each?
mutation: .venv/ready
	$(BIN)/python -m tests.mutation

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/pagellm bench --prefill 512 --decode 64 --batch 1,16

clean:
	rm -rf .venv .venv-clients .venv-lowest build *.egg-info
