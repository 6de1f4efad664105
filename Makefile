# `make demo` and `make test` do everything on a fresh machine: they create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
ALONE := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
RUN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2}

.PHONY: help demo test test-fast test-slow quick next parity fuzz owners codes clients lint types gallery docs dist ci clean

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

# torch goes in first, so that nothing else pulls another build of it. pip knows groups since 25.1.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	@touch $@

$(VENV)/.%: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable . --group $*
	@touch $@

demo: $(VENV)/.demo ## train on real data; tables here, pictures in demo_output/
	$(BIN)/python -m demo

# Two processes, which take about the same time: what compiles and the comparisons with references;
# and the rest. Each keeps one core busy, and so has one thread.
test: $(VENV)/.test $(VENV)/.demo $(VENV)/.parity ## all tests: laws, parity with torch.optim and optax, examples in docs and docstrings
	$(MAKE) --no-print-directory --jobs 2 test-fast test-slow

test-fast: $(VENV)/.test $(VENV)/.demo $(VENV)/.parity
	$(ALONE) $(BIN)/python -m pytest -q -rs -m "not slow and not compares"

test-slow: $(VENV)/.test $(VENV)/.demo $(VENV)/.parity
	$(ALONE) $(BIN)/python -m pytest -q -rs -m "slow or compares"

quick: $(VENV)/.test ## the tests that do not compile
	$(RUN) $(BIN)/python -m pytest -q -m "not slow"

parity: $(VENV)/.test $(VENV)/.parity ## compare every name with its reference, and write docs/parity.md
	$(RUN) $(BIN)/python -m pytest -q -m compares --parity-page tests

fuzz: $(VENV)/.test ## 10,000 random programs: every execution against update; FO_SEED sets the first
	$(ALONE) PYTHONPATH=. $(BIN)/python tests/fuzz.py
	$(ALONE) PYTHONPATH=. $(BIN)/python tests/fuzz.py --executions sharded --count 1000

owners: $(VENV)/.test ## sharded matrices on 2 and 4 ranks: what is sent and worked on, and every test of it
	$(ALONE) PYTHONPATH=.:tests $(BIN)/python tests/distributed/owners.py
	$(ALONE) $(BIN)/python -m pytest -q -rs tests/distributed

codes: $(VENV)/.test ## the laws of every code around every row that has slots: an hour
	FO_EVERY_CODE=1 $(ALONE) $(BIN)/python -m pytest -q -rs tests/test_codecs.py

# These files lean on what is private to torch, which changes from one release to the next.
COMPILED := $(addprefix tests/test_,compiled.py again.py writes.py sums.py precision.py checks_compile.py) tests/lowered

next: ## what compiles, with the torch of constraints-next.txt, in .venv-next
	$(MAKE) --no-print-directory VENV=.venv-next CONSTRAINTS=constraints-next.txt .venv-next/.test
	$(RUN) .venv-next/bin/python -m pytest -q -rs $(COMPILED)

# timm by itself: its torchvision must be built for the very torch that is there, and the others
# import it wherever it is found.
clients: ## training under the libraries that people have around torch, in .venv-clients
	$(MAKE) --no-print-directory VENV=.venv-clients .venv-clients/.clients
	.venv-clients/bin/pip install --quiet --no-deps "timm>=1.0.20"
	$(RUN) .venv-clients/bin/python -m pytest -q -rs clients

lint: $(VENV)/.dev ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## static types
	$(BIN)/mypy functorch_opt

# Ten minutes: 77 optimizers on two functions. Only the pages: python -m benchmarks.gallery --pages
gallery: $(VENV)/.demo ## draw the pictures of the gallery, and write its pages
	$(ALONE) $(BIN)/python -m benchmarks.gallery

docs: $(VENV)/.docs ## build the site into site/, strictly
	$(BIN)/zensical build --strict --clean

dist: $(VENV)/.dist ## build a wheel and an sdist, and try both in a clean environment
	BIN=$(abspath $(BIN)) CONSTRAINTS=$(abspath $(CONSTRAINTS)) .ci/dist

ci: lint types docs test ## everything

clean:
	rm -rf $(VENV) .venv-next .venv-clients site dist demo_output .pytest_cache .ruff_cache .mypy_cache
