# The two commands a newcomer needs: `make quickstart` and `make test`. Both make the virtual environment when it is absent.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
# One compute thread a process: the work is spread over processes, and two threads on a busy core cost more than they give.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: install quickstart test test-fast test-faults lint format constraints clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# Without an NVIDIA driver the CPU build of torch, from any index configured, else from PyTorch's own.
	if [ -e /dev/nvidiactl ]; then $(BIN)/pip install --quiet -c constraints.txt torch; \
	else $(BIN)/pip install --quiet "torch==$$(sed -n 's/^torch==//p' constraints.txt)+cpu" || \
	     $(BIN)/pip install --quiet --index-url https://download.pytorch.org/whl/cpu "torch==$$(sed -n 's/^torch==//p' constraints.txt)"; fi
	$(BIN)/pip install --quiet -c constraints.txt -e '.[samples,dev]'
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
