# Needs Python 3.11 or newer, git and make; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt
PIP := $(BIN) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Python's compiled files are kept whatever the environment says: tests start some hundred processes.
TESTED := $(ONE_THREAD) PYTHONDONTWRITEBYTECODE=
SITE := tests/test_site.py
SPHINX := $(BIN) -m sphinx -W --keep-going -q -b html docs docs/_build/html

.PHONY: help demo test test-lowest test-newest style types site suite bench docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train all rules side by side on handwritten digits; ends with the path of the report"
	@echo "make test    everything CI checks"
	@echo "make test-lowest  the tests with the lowest PyTorch that pyproject.toml allows, in .venv-lowest"
	@echo "make test-newest  the tests with the newest PyTorch that pip finds, in .venv-newest"
	@echo "make bench   time and memory of every rule relative to backpropagation"
	@echo "make docs    the documentation, in docs/_build/html"
	@echo "make clean   remove what these made, except $(VENV)"

$(BIN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "apical needs Python 3.11 or newer: make PYTHON=...")'
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Stamps: install once, and again when the requirements change. They are reached through an order-only $(BIN), whose
# date means nothing.
$(VENV)/.apical-installed: pyproject.toml $(CONSTRAINTS) | $(BIN)
	@echo "== installing apical (the first time this downloads PyTorch)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.apical-installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)
	@echo "== installing apical with what its tests and documentation need (the first time this downloads PyTorch)"
	@$(PIP) -e '.[dev,docs]'
	@touch $(VENV)/.apical-installed $@

demo: $(VENV)/.apical-installed
	@echo "== training"
	@$(BIN) -m apical compare --rules bp fa dfa usf kp pfa pfa-o --data digits --seeds 3 --out demo --overwrite

test: $(VENV)/.apical-installed-dev
	@$(MAKE) --no-print-directory -j4 style types site suite

# What `make test` checks, all at once: the tests often wait for a cluster or an interrupt, and the rest runs meanwhile.
style: $(VENV)/.apical-installed-dev
	@echo "== style"
	@$(BIN) -m ruff check .
	@$(BIN) -m ruff format --check .

types: $(VENV)/.apical-installed-dev
	@echo "== types"
	@$(BIN) -m mypy src docs/generate.py

site: $(VENV)/.apical-installed-dev
	@echo "== documentation and its tests"
	@$(TESTED) $(SPHINX)
	@$(TESTED) $(BIN) -m pytest -q -p no:cacheprovider $(SITE)

suite: $(VENV)/.apical-installed-dev
	@echo "== tests"
	@$(TESTED) $(BIN) -m pytest -q -n $(WORKERS) --dist loadgroup --durations=20 --ignore=$(SITE)

test-lowest:
	@$(MAKE) --no-print-directory suite VENV=.venv-lowest CONSTRAINTS=lowest.txt

test-newest:
	@$(MAKE) --no-print-directory suite VENV=.venv-newest CONSTRAINTS=newest.txt

bench: $(VENV)/.apical-installed-dev
	@echo "== benchmarks"
	@$(ONE_THREAD) $(BIN) benchmarks/run.py
	@$(ONE_THREAD) $(BIN) benchmarks/control.py
	@$(ONE_THREAD) $(BIN) benchmarks/ccl.py
	@$(ONE_THREAD) $(BIN) benchmarks/evolution.py
	@$(ONE_THREAD) $(BIN) benchmarks/settling.py
	@$(ONE_THREAD) $(BIN) benchmarks/floors.py
	@$(ONE_THREAD) $(BIN) benchmarks/local.py
	@$(ONE_THREAD) $(BIN) benchmarks/scaling.py
	@$(ONE_THREAD) $(BIN) benchmarks/compiled.py
	@$(BIN) benchmarks/figures.py
	@$(BIN) docs/generate.py

docs: $(VENV)/.apical-installed-dev
	@$(BIN) docs/generate.py
	@$(SPHINX)
	@echo "documentation: docs/_build/html/index.html"

clean:
	rm -rf demo build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
