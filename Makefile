PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin
READY := .venv/.ready
BUILT := _build/.built

.DEFAULT_GOAL := help
.PHONY: help book test serve lint bench results mutants mutants-all clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

book: $(READY)  ## set up, execute every chapter, build the site
	@$(BIN)/python tools/export_notebooks.py
	@rm -rf _build/html/_modules  # Sphinx would keep the listings of modules that are gone
	@# After a failed build Sphinx would not look again at the pages that failed: build all of them.
	@all=$$(test -e $(BUILT) || echo --all); rm -f $(BUILT); \
		$(BIN)/jupyter-book build book/ -n -W --keep-going $$all
	@touch $(BUILT)
	@echo "The book is at $(CURDIR)/_build/html/index.html"

test: book lint  ## set up, build, lint, and run every test and every notebook
	@# The last lines are the ten slowest tests and the time of all.
	@$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 --durations=10 \
		tests book

serve: book  ## read the book at http://localhost:8000
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

lint: $(READY)  ## check style
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

bench: $(READY)  ## run every benchmark, JSON into _build/bench
	@mkdir -p _build/bench
	@set -e; for script in benchmarks/*.py; do \
		$(BIN)/python $$script --json _build/bench/$$(basename $$script .py).json; done

results: $(READY)  ## measure again the numbers that the book quotes
	@$(BIN)/python -m qlearn.results
	@$(BIN)/python tools/write_ledger.py

mutants: $(READY)  ## plant faults in the modules that differ from main; 5 minutes at most
	@$(BIN)/python -m tools.mutants --minutes 5

mutants-all: $(READY)  ## plant faults in every module and keep the table; an hour on two cores
	@$(BIN)/python -m tools.mutants --all

clean:  ## remove what was built (.venv stays)
	@rm -rf _build

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("qlearn needs Python 3.11 or newer: make PYTHON=python3.11")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time takes minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[book,test]"
	@touch $@
