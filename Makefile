# make demo, make test, make docs: all work in .venv, which the versions in constraints.txt fill once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test docs

demo: $(READY)
	$(BIN)/bitscape demo

# Two processes of one thread each are the quickest on two cores. Passive waiting: on a shared machine, threads that spin cost up to 7x.
# No cache: it does not notice that a module, imported before it existed, has been added.
test: export OMP_WAIT_POLICY = passive
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n 2 --dist loadfile

# Tables and figures from benchmarks/results, pages of methods from the source; then links, examples and command lines are checked.
docs: $(READY)
	$(BIN)/python -m benchmarks.tables
	$(BIN)/pytest tests/docs tests/test_readme.py

# torch first: a package resolved before it could bring another build of it.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e .[dev]
	touch $@
