# make demo, make test: both work in .venv, which the versions in constraints.txt fill once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test

demo: $(READY)
	$(BIN)/bitscape demo

# Passive waiting: on a shared machine, threads that spin cost up to 7x.
# No cache: it does not notice that a module, imported before it existed, has been added.
test: export OMP_WAIT_POLICY = passive
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest

# torch first: a package resolved before it could bring another build of it.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e .[dev]
	touch $@
