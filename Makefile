# make demo, make check, make test, make docs, make site: all work in .venv, which the versions in constraints.txt fill once.
# make speed: beside the stored ratios of this kind of machine; none of the tests.
# make bounds: an environment of its own, with the lowest versions that pyproject.toml allows.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo lint check test docs site bounds speed

demo: $(READY)
	$(BIN)/bitscape demo

# Compiled files are kept, even where the environment forbids it: without them, collecting the
# tests takes twice as long, and every process that a test starts compiles bitscape anew.
unexport PYTHONDONTWRITEBYTECODE

# Two processes of one thread each are the quickest on two cores. Passive waiting: on a shared machine, threads that spin cost up to 7x.
check test speed: export OMP_WAIT_POLICY = passive
check test speed: export OMP_NUM_THREADS = 1

# tests/conftest.py says which tests share a process, and in which order they run.
WORKERS := -n 2 --no-loadscope-reorder

check: lint
	$(BIN)/pytest $(WORKERS) -m "not slow and not signals"

test: lint site
	$(BIN)/pytest -m signals $$(grep -rl --include="*.py" mark.signals tests)
	$(BIN)/pytest $(WORKERS) -m "not signals"

# No cache of import-linter: it does not notice that a module, imported before it existed, has been added.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Tables and figures from benchmarks/results, pages of methods from the source; then links, examples and command lines are checked.
docs: $(READY)
	$(BIN)/python -m benchmarks.tables
	$(BIN)/pytest tests/docs tests/test_readme.py

# The pages of docs and the docstrings of the public names as a site, in build/site; a broken link is an error,
# but not with --quiet, which counts no warnings.
site: $(READY)
	$(BIN)/mkdocs build

# Not a part of `make test`: about a minute, and other programs disturb it. STORE=1 stores what a quiet machine measures.
speed: $(READY)
	$(BIN)/python -m benchmarks.speed_gate $(if $(STORE),--store)

# Not a part of `make test`: it downloads. For example: make bounds PYTHON=python3.12 BOUNDS="--torch 2.11.0 tests/searches"
bounds:
	$(PYTHON) tools/bounds.py $(BOUNDS)

# torch first: a package resolved before it could bring another build of it.
$(READY): constraints.txt pyproject.toml hatch_build.py src/bitscape/quant/kernels/kernels.c
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e .[dev,docs]
	touch $@
