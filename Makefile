PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tested with torch 2.11 and 2.13; another one is taken by: make demo TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
DEMO ?=
BENCH ?=

# Threads that wait sleep instead of spin: cores may be shared.
export OMP_WAIT_POLICY := passive

.PHONY: demo bench test lint clean

demo: $(VENV)/ready
	$(BIN)/flash-entmax demo $(DEMO)

bench: $(VENV)/ready
	$(BIN)/flash-entmax bench $(BENCH)

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out build dist
