# The two commands a newcomer needs: `make quickstart` and `make test`. Both make the virtual environment when it is absent.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
CPU_INDEX := --retries 1 --index-url https://download.pytorch.org/whl/cpu
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder
# One compute thread a process: the work is spread over processes, and two threads on a busy core cost more than they give.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: install quickstart test test-fast test-faults lint format constraints clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# Without an NVIDIA driver the CPU build of torch, where there is one for this Python and an index that has it answers.
	@if [ -e /dev/nvidiactl ]; then $(PIP) -c constraints.txt torch; \
	elif echo "torch: the CPU build, from the indexes configured" && $(PIP) "$(TORCH)+cpu" 2>/dev/null; then :; \
	elif echo "torch: not there; from PyTorch's CPU index" && $(PIP) $(CPU_INDEX) "$(TORCH)" 2>/dev/null; then :; \
	else echo "torch: not there either; the ordinary build, from the indexes configured" && $(PIP) "$(TORCH)"; fi
	$(PIP) -c constraints.txt -e '.[samples,dev]'
	touch $(STAMP)

quickstart: install
	$(BIN)/ringworld run recipes/quickstart.yaml

test: install
	$(PYTEST) -m 'not faults'

test-fast: install
	$(PYTEST) -m 'not slow and not faults'

# Kills, hangs, two drivers and long runs.
test-faults: install
	$(PYTEST) -m faults

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: install
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

constraints: install
	{ sed -n '1p' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
