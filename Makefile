PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

RUN := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: install demo test test-integration test-slow bench gpu numbers lint format docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/rpsa run recipes/tiny/demo.yaml

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadgroup

test-integration: install
	HF_HUB_OFFLINE=1 HYPOTHESIS_PROFILE=thorough \
	  $(BIN)/pytest -n logical --maxprocesses 8 --dist loadgroup -m "(integration or hypothesis) and not slow"

test-slow: install
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m slow

bench: install
	$(BIN)/python benchmarks/bench.py --write

# on the machine with the GPU, which may have no network: nothing is installed
gpu:
	$(RUN) benchmarks/gpu.py $(GPU)

numbers: install
	$(BIN)/python benchmarks/docs_numbers.py demo
	$(BIN)/python benchmarks/docs_numbers.py plans

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
