# What people type. `make PYTHON=/path/to/python …` uses that interpreter as it is: no .venv is made
# and nothing is downloaded. Without it, .venv is made with PYTHON_FOR_VENV (Python ≥ 3.11).
#
#   make demo        train a small network on real photographs and look at the result
#   make test        the tests that decide (≤ 15 minutes on 2 cores)
#   make test-all    every test
#   make verify      every kernel that can run here against float64
#   make bench       speed and memory of operators and networks on this machine, minutes
#   make lint        formatting and static checks
#   make docs        every docstring as pages in docs/api
#   make gpu-report OUT=folder   on a machine with a GPU: tests, checks, speed, memory checker

PYTHON_FOR_VENV ?= python3
# a GPU's users may want another build, such as TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# the build never looks for a GPU; here, where it would take minutes for nothing, we do
MITNET_FAST_BUILD ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo cpu)
export MITNET_FAST_BUILD

ifdef PYTHON
  PY := $(PYTHON)
  INSTALLED := .installed-as-it-is
else
  PY := .venv/bin/python
  INSTALLED := .venv/.installed
endif

BUILD_INPUTS := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-all verify bench lint docs gpu-report clean $(if $(PYTHON),$(INSTALLED))

demo: $(INSTALLED)
	$(PY) -m mitnet_fast demo $(DEMO_ARGS)

test: $(INSTALLED)
	$(PY) -m pytest -n 2 --dist loadfile -m "not exhaustive" $(TEST_ARGS)

test-all: $(INSTALLED)
	$(PY) -m pytest -n 2 --dist loadfile $(TEST_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files -z -- '*.c' '*.cpp' '*.cu' '*.h' '*.cuh' | xargs -0 $(CLANG_FORMAT) --dry-run --Werror

docs: $(INSTALLED)
ifndef PYTHON
	$(PY) -m pip install -q -e ".[docs]" --no-build-isolation
endif
	$(PY) -m pdoc --docformat google --output-directory docs/api mitnet_fast '!mitnet_fast.triton_kernels'

verify: $(INSTALLED)
	$(PY) -m mitnet_fast verify $(VERIFY_ARGS)

bench: $(INSTALLED)
	$(PY) -m mitnet_fast bench $(BENCH_ARGS)

# for this machine's GPU alone, since the report has to end within minutes
gpu-report: export TORCH_CUDA_ARCH_LIST ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
gpu-report: $(INSTALLED)
	$(PY) -m benchmarks.gpu_report $(or $(OUT),gpu-report) $(REPORT_ARGS)

CLANG_FORMAT ?= $(dir $(PY))clang-format

.venv/bin/python:
	$(PYTHON_FOR_VENV) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON_FOR_VENV) -m venv .venv

.venv/.installed: .venv/bin/python $(BUILD_INPUTS)
	.venv/bin/python -m pip install -q $(TORCH)
	.venv/bin/python -m pip install -q "setuptools>=70" wheel ninja pybind11 numpy
	.venv/bin/python -m pip install -q --no-build-isolation -e ".[dev,triton]"
	touch $@

.installed-as-it-is:
	$(PY) -m pip install -q --no-index --no-build-isolation --no-deps -e .

clean:
	rm -rf build dist *.egg-info mitnet_fast/_C*.so .venv/.installed
