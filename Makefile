# Each target sets everything up by itself. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: setup demo check fast test soak lint types docs bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"$(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12"; \
		exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo \
		"$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/pip install --quiet --no-deps resemblyzer==0.1.4
	touch $@

demo: setup
	$(BIN)/python -m llasa_jax.demo

PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What to run before a commit.
check: setup
	$(MAKE) --jobs 3 --output-sync lint types fast

# The tests that are not marked slow.
fast: setup
	$(PYTEST) -m "not slow and not soak"

# Every test but the long series.
test: setup
	$(PYTEST) -m "not soak"

# Long series: kills, many hosts, a whole notebook, more parameters of what `make test` runs once.
soak: setup
	$(PYTEST) -m soak

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# With --quiet, --strict would see no warnings.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Not those that train for hours, or need Ray or a GPU, nor what others import.
LONG = $(addprefix benchmarks/,attention.py speak.py preference.py train_codec.py ray_kills.py \
	lengths.py spoken_world.py)

bench: setup
	for program in $(filter-out $(LONG),$(wildcard benchmarks/*.py)); do \
		$(BIN)/python $$program || exit 1; done

clean:
	rm -rf $(VENV) .cache demo_out build *.egg-info
