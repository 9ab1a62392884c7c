# make demo       quantize SmolLM2 to W4A4KV4 with a learned rotation, and show what it gained
# make test       every test
# make lint       ruff and mypy
# make benchmark  the speed table
# Each sets up .venv first, once; PYTHON=… chooses the interpreter.

.DEFAULT_GOAL := help
.PHONY: help demo test lint benchmark clean

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && exit; done; echo python3)
WORKERS ?= auto
BIN := .venv/bin
READY := .venv/.ready

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)' || { \
	  echo "spinfold needs Python 3.11, 3.12 or 3.13." >&2; \
	  echo "Why: '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Do:  install one of them, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@# Some distributions ship venv without ensurepip: then the system's pip fills the environment.
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip .venv && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

# One process per core with one thread each: many small networks gain nothing from more threads.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses=8 --dist=worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(READY)
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
