# make test, make demo: each sets up everything it needs in .venv (once), then runs. make test-all runs the tests that
# `make test` leaves out as well.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install
STAMP := $(VENV)/.gfast-installed
SOURCES := requirements.txt pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

# The CPU build of torch where there is no NVIDIA GPU. PyPI's own Linux wheels bring gigabytes of CUDA libraries.
CPU_TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
GPU_TORCH := torch>=2.11

.PHONY: test test-slow test-all demo docs install integrations deepspeed lint cuda-check arm-check sanitize sanitize-threads fuzz clean

# All cores, a file at a time on one thread each, the longest files first.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: install
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: install
	$(PYTEST) $(PYTEST_ARGS)

demo: install
	$(VENV)/bin/gfast demo $(DEMO_ARGS)

# The site, into build/site; a warning is an error.
docs: install
	$(PIP) -q -r docs/requirements.txt
	PATH="$(abspath $(VENV))/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

install: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@set -e; if $(PY) -c 'import torch' 2>/dev/null; then \
	  echo "torch is already in $(VENV)"; \
	elif nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) '$(GPU_TORCH)'; \
	elif $(PY) -c 'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; then \
	  $(PIP) '$(CPU_TORCH)' --extra-index-url $(CPU_INDEX); \
	else \
	  $(PIP) '$(CPU_TORCH)'; \
	fi
	$(PIP) -r requirements.txt
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

# Other libraries that gfast works inside of; without them their tests skip.
integrations: install
	$(PIP) -q $$($(PY) -c 'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["integrations"])')

# The tests in DeepSpeed's own engine. It lies apart: where it can be imported, Accelerate, transformers and TRL do so.
ENGINE := build/deepspeed
deepspeed: install
	$(PIP) -q --no-deps --upgrade --target $(ENGINE) deepspeed einops hjson msgpack ninja py-cpuinfo \
	  || echo "DeepSpeed could not be installed: its tests skip"
	PYTHONPATH=$(abspath $(ENGINE)) $(PYTEST) tests/test_wrappers_deepspeed.py tests/test_live_zero.py

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

cuda-check: install
	csrc/cuda/compile_check.sh
	$(PYTEST) tests/test_cuda_compiles.py tests/test_cuda_on_cpu.py

# The CPU kernels for 64-bit ARM, run under QEMU: apt-get install g++-aarch64-linux-gnu qemu-user
arm-check: install
	$(PY) -m pytest -n0 -rs tests/test_kernels_alone.py

# The CPU extension under AddressSanitizer and UndefinedBehaviorSanitizer; under ThreadSanitizer; more cases of the fuzzer.
sanitize: install
	.ci/sanitized $(PY) address,undefined $(or $(CASES),3000)

sanitize-threads: install
	.ci/sanitized $(PY) thread 500

fuzz: install
	$(PY) tests/fuzz $(or $(CASES),100000)

clean:
	rm -rf build dist *.egg-info gfast/*.so
