# Each target does all of its own set-up, in .venv, on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0
NAMES ?= coldstart fleet loras memory overhead overlap peers workers
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-all test-models chaos fuzz bench gpu check audit dev format coverage clean

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/run.stamp  ## make the demo's pictures; again: nothing to do (FRESH=1 starts afresh)
	$(BIN)/python main.py demo $(if $(FRESH),--fresh)

test: $(VENV)/dev.stamp  ## the tests of every commit: minutes
	$(PYTEST) -m "not full" $(ARGS)

test-all: $(VENV)/dev.stamp ## every test that needs no GPU; what CI runs
	$(PYTEST) $(ARGS)

test-models: $(VENV)/dev.stamp ## long tests of models and workers, by hand
	$(PYTEST) -m "models or scale" $(ARGS)

chaos: $(VENV)/dev.stamp ## kill workers, KILLS=20 at each point, and print what became of their work
	$(BIN)/python -m tests.chaos $(if $(KILLS),--kills $(KILLS)) $(ARGS)

fuzz: $(VENV)/dev.stamp  ## search for inputs that break a property, MINUTES=5
	$(BIN)/python -m tests.fuzz $(MINUTES)

bench: $(VENV)/dev.stamp ## measure NAMES (all but gpu), keep the figures, and put them into docs/
	@status=0; for name in $(NAMES); do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS) || status=$$?; \
	done; $(BIN)/python -m benchmarks.table --write && exit $$status

gpu: $(VENV)/dev.stamp   ## run the tests that need a CUDA device
	$(BIN)/python -m pytest tests/gpu -m gpu $(ARGS)

check: $(VENV)/dev.stamp ## lint, types, imports, tests without clocks, the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.lint
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint Dockerfile

audit: $(VENV)/dev.stamp ## look up known vulnerabilities of what a run needs; wants an open network
	$(BIN)/python -m pip install --quiet -e '.[audit]'
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement requirements.txt

coverage: $(VENV)/dev.stamp ## how much of the code the tests in this process reach
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

dev: $(VENV)/dev.stamp   ## install everything for working on it

format: $(VENV)/dev.stamp ## put the code in its usual shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove what these targets made
	rm -rf $(VENV) text2img-demo .pytest_cache .ruff_cache .mypy_cache .chaos

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "text2img needs Python 3.11 or newer; say which: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev.stamp: pyproject.toml $(VENV)/run.stamp
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[dev]'
	touch $@
