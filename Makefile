# make run    set everything up and chat with the bundled model     make test   set everything up and run the tests
# make check  format, lint, types, import law                       make bench  tables, then one JSON line
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  ?=
SEED   ?= 0

# The fact sheets that the oracle tests read, where a neighbouring folder has them.
ifneq ($(wildcard ../shared/facts),)
export CABOCHON_FACTS ?= $(abspath ../shared/facts)
endif

.PHONY: run test check format bench slow sanitise pebble clean

run: $(READY)
	$(BIN)/cabochon chat $(MODEL)

test: $(READY)
	$(BIN)/pytest -n 2

slow: $(READY)
	$(BIN)/pytest -m slow

sanitise: $(READY)
	scripts/sanitise.sh

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/cabochon bench latency

pebble: $(READY)
	$(BIN)/python scripts/pebble/train.py --seed $(SEED) --out build/pebble/seed$(SEED)
	$(BIN)/python scripts/pebble/senses.py --seed $(SEED) --text build/pebble/seed$(SEED) --out build/pebble/seed$(SEED)/senses
	$(BIN)/python scripts/pebble/drafter.py build/pebble/seed$(SEED)/senses --seed $(SEED)

# The C++ sources too: kernels of another version than the package are worse than none.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/cabochon/ops/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
