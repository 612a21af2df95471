# Two commands set everything up: `make demo` shows a swarm at work, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test bench lint lock system-deps clean

help:
	@echo "make demo         six daemons on this machine fetch a file; shows what it saved (no root, under a minute)"
	@echo "make test         every test that needs no installed program; SYSTEM=1 adds real clients and network namespaces (root)"
	@echo "make bench        the figures in docs/reference/benchmarks.md (root; raw results in results/)"
	@echo "make lint         ruff and mypy --strict"
	@echo "make system-deps  Debian packages for SYSTEM=1 and bench (root)"
	@echo "make lock         resolve requirements/*.txt anew"

$(STAMP): requirements/lock.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/lock.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)
	$(BIN)/swarm demo

test: $(STAMP)
	SYSTEM=$(SYSTEM) $(BIN)/python -m pytest $(TESTS)

bench: $(STAMP) $(VENV)/.bench
	$(BIN)/python -m tests.benchmarks $(BENCH)

$(VENV)/.bench: requirements/bench.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bench.txt
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

system-deps:
	./requirements/system-deps.sh

lock: $(STAMP)
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-header --upgrade -o requirements/lock.txt requirements/lock.in
	$(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-header --upgrade -o requirements/bench.txt requirements/bench.in

clean:
	rm -rf $(VENV) results .mypy_cache .pytest_cache .ruff_cache
