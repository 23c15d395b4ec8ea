# Every command a developer needs; PYTHON is the environment that has torch.
PYTHON ?= python
SOURCES := $(shell find csrc cpp_tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build check format test check-full gpu-check bench

build:  ## the extension, in place
	$(PYTHON) -m pip install -e ".[dev]"

check:  ## formatting, lint, types, import contracts, layout: no build needed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	clang-format --dry-run --Werror $(SOURCES)
	$(PYTHON) -m mypy
	lint-imports
	pytest -q python_tests/test_layout.py

format:  ## rewrites the sources in the project's style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	clang-format -i $(SOURCES)

test:  ## all Python tests; they build and run the C++ tests too
	pytest

check-full: check test  ## and what takes longer: torch versions, ways to install, mutations
	.ci/check-full

gpu-check:  ## on a machine with a GPU: what only a GPU can tell; writes benchmarks/results/gpu-*.md
	$(PYTHON) .ci/gpu_check.py

bench:  ## adapters and losses against plain PyTorch and PEFT: align-lora bench --help
	$(PYTHON) -m align_ext.cli bench
