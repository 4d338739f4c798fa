PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tested with torch 2.11, 2.13, 2.14 and 2.15; another one is taken by: make demo TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
DEMO ?=
BENCH ?=
EVIDENCE ?=
# Random calls that make fuzz draws
FUZZ ?= 10000

# What make test takes without a GPU: 10 minutes were measured on idle cores
TEST_TIME := 10 to 20 minutes on 2 cores

# Threads that wait sleep instead of spin: cores may be shared.
export OMP_WAIT_POLICY := passive

.PHONY: demo bench evidence test fuzz sanitize lint site docs release clean

demo: $(VENV)/ready
	$(BIN)/flash-entmax demo $(DEMO)

bench: $(VENV)/ready
	$(BIN)/flash-entmax bench $(BENCH)

evidence: $(VENV)/ready
	$(BIN)/flash-entmax recipe all $(EVIDENCE)

test: $(VENV)/ready
	@echo "The tests take about $(TEST_TIME)."
	$(BIN)/python -m pytest -n auto --dist loadgroup --max-worker-restart 0

fuzz: $(VENV)/ready
	HYPOTHESIS_PROFILE=fuzz FUZZ_EXAMPLES=$(FUZZ) $(BIN)/python -m pytest tests/test_fuzz.py -n auto

sanitize: $(VENV)/ready  # needs a GPU and compute-sanitizer
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	        $(BIN)/python tests/sanitize.py || exit 1; \
	done

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

release: $(VENV)/ready
	$(BIN)/python tests/release.py --torch "$(TORCH)"

site: $(VENV)/ready  # into out/site; a warning is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --conf-dir docs . out/site

docs: site
	$(BIN)/python -m http.server --directory out/site 8000

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out build dist
