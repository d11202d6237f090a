# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first if it is not there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# pip compiles no sources (half of an install): each module is when it is first imported, and this must not be forbidden then
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/pip install --quiet --no-compile
TRITON := $(shell sed -n 's/.*"\(triton==[0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: demo model test test-slow test-gpu test-versions coverage lint fix bench bench-overhead size clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch is pinned: a looser request would take a CUDA build of several gigabytes. Triton is as large: each on a core of its own
	$(PIP) --no-deps $(TRITON) & $(PIP) torch==2.13.0 && wait $$! && $(PIP) -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# a small model that finds facts at 128K, for helix-compile eval: about a minute of one core
model: $(STAMP)
	$(BIN)/python examples/train_recall.py --out out/recall

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p helix_compile
	$(BIN)/mypy examples
	$(BIN)/python tools/lint_imports.py
	$(BIN)/codespell helix_compile tests examples benchmarks docs *.md

# the first two keep one core busy each, side by side
test: $(STAMP)
	$(MAKE) --jobs 2 --output-sync=target lint test-newest-transformers
	$(BIN)/python -m pytest -m "not gpu and not slow" -n auto --dist loadfile --no-loadscope-reorder

# The newest transformers beside the environment's own: a few tests that go through capture, generate() and torch.compile.
NEWEST := $(VENV)/newest-transformers
test-newest-transformers: $(STAMP)
	test -d $(NEWEST) || $(PIP) --no-deps --target $(NEWEST) transformers==5.24.0
	PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -q tests/test_smoke.py tests/dynamo/test_backend.py::test_left_padding

# lm-evaluation-harness is half a gigabyte with what it needs: only here
test-slow: $(STAMP)
	$(PIP) -e ".[eval]"
	$(BIN)/python -m pytest -m slow

# Lines that CI's tests run, and which of its heavy tests run none of their own: candidates for tests/slow_variants.txt
coverage: $(STAMP)
	$(PIP) "pytest-cov>=7"
	$(BIN)/python -m pytest -m "not gpu and not slow" -n auto --dist loadfile --no-loadscope-reorder \
	  --cov=helix_compile --cov-context=test --cov-report=term --junitxml=out/coverage.xml -o junit_family=xunit1
	$(BIN)/python tools/variants.py out/coverage.xml .coverage

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# The oldest and the newest versions that are supported, each in an environment of its own, through the smoke tier.
# On x86 either brings its CUDA libraries (5 gigabytes). Triton 3.6's interpreter needs numpy below 2.4.
lowest := torch==2.11.0 triton==3.6.0 transformers==5.17.0 numpy==2.3.5
newest := torch==2.15.0 triton==3.9.0 transformers==5.24.0
SMOKE := tests/test_smoke.py tests/runtime/test_device.py tests/dynamo/test_backend.py \
  tests/saving/test_saving.py tests/capture/test_paths.py tests/ir/test_ops.py \
  tests/distributed/test_world.py

test-versions: test-lowest test-newest

test-lowest test-newest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet $($*)
	.venv-$*/bin/pip install --quiet $($*) -e . "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100" "psutil>=6"
	.venv-$*/bin/python -m pytest $(SMOKE) -m "not gpu and not slow" -n auto --dist loadfile

fix: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What a step costs outside of operators, as docs/benchmarks.md has it: cold, warm, wider, and both over gloo. On an idle machine.
WIDER := --repeats 10 --hidden 2048 --layers 2 --context 16384
bench-overhead: $(STAMP)
	cache=$$(mktemp -d) && trap "rm -r $$cache" EXIT && export TORCHINDUCTOR_CACHE_DIR=$$cache OMP_NUM_THREADS=1 && \
	$(BIN)/python benchmarks/step_overhead.py && $(BIN)/python benchmarks/step_overhead.py && \
	$(BIN)/python benchmarks/step_overhead.py $(WIDER) && \
	$(BIN)/torchrun --nproc-per-node 2 benchmarks/step_overhead.py && \
	$(BIN)/torchrun --nproc-per-node 4 benchmarks/step_overhead.py && \
	$(BIN)/torchrun --nproc-per-node 4 benchmarks/step_overhead.py $(WIDER)

bench: $(STAMP)
	$(BIN)/python benchmarks/decode_step.py
	$(BIN)/python benchmarks/sparse_step.py
	$(BIN)/python benchmarks/step_checks.py
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/virtual_world.py
	$(BIN)/torchrun --nproc-per-node 4 benchmarks/distributed_step.py
	$(BIN)/python benchmarks/handover.py
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/prefill_memory.py --resident 61440

size:
	@wc -l $$(git ls-files 'helix_compile/*.py') | sort -n

clean:
	rm -rf .coverage $(VENV) .venv-lowest .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
