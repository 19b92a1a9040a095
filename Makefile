# Needs Python >= 3.11 and make; everything else is installed into $(VENV).
#   make demo    draw a small data set, train, evaluate, draw pictures (docs/performance.md has its time)
#   make test    the whole test suite
#   make web-test  the page of examples/web in headless Chromium (apt-get install chromium; needs npm)
#   make fuzz    the property-based tests with $(FUZZ_EXAMPLES) new cases each, 25,000 in all (minutes)
#   make kill-test  disturb small runs at 4 x 30 random moments and compare the losses (half an hour)
#   make lint    ruff: rules and format          make types    pyright
#   make docs    the site of docs/ in build/site; a dead link or an unknown name fails
#   make notebooks  run the notebooks and store them with their outputs
#   make parity  the largest error against each recorded case of the original
# Another interpreter or environment: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_CONFIG ?= configs/shapes.py
DEMO_RUN ?= runs/shapes
DEMO_FLAGS ?=
FUZZ_EXAMPLES ?= 2500
KILLS ?= 30
MUTATED_FILES := test_mutated_files_are_read_or_refused_by_one_type_of_error
FUZZ_TESTS := tests/unit/test_fuzz.py tests/unit/test_weights_files.py::$(MUTATED_FILES)
# In the order of the folders, where the long files come first: by itself xdist takes those with few
# tests last, and one worker waits for the other.
TEST_FLAGS ?= -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart=1 --durations=15

.PHONY: help install demo test web-test fuzz kill-test parity lint types docs notebooks clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,11s/^# *//p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "sparseinst_jax needs Python >= 3.11, got: $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs,notebooks]"
	@touch $@

# How sums are rounded, and so the course of a run, depends on the number of threads: the curve in
# docs/performance.md is that of 32.
demo: export NPROC ?= 32
demo: export PJRT_NPROC ?= 32
demo: $(STAMP)
	$(BIN)/python train.py --config $(DEMO_CONFIG) --workdir $(DEMO_RUN) $(DEMO_FLAGS)
	$(BIN)/python eval.py --workdir $(DEMO_RUN)
	@echo
	@echo "Result            $(DEMO_RUN)/eval/metrics.json"
	@echo "Predictions       $(DEMO_RUN)/eval/predictions.json"
	@echo "Pictures          $(DEMO_RUN)/eval/*.png"
	@echo "Training curves   $(DEMO_RUN)/curves.png, $(DEMO_RUN)/metrics.csv"
	@echo "Model             $(DEMO_RUN)/checkpoints"
	@echo "Next: $(BIN)/python predict.py --workdir $(DEMO_RUN) IMAGE_OR_FOLDER --output out"

test: $(STAMP)
	$(BIN)/python -m pytest $(TEST_FLAGS)

web-test: $(STAMP)
	cd examples/web && npm install --no-audit --no-fund
	$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright
	$(BIN)/python -m pytest -q tests/end_to_end/test_web.py

fuzz: $(STAMP)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q --timeout=3600 --durations=12 $(FUZZ_TESTS)

kill-test: $(STAMP)
	for by in kill tee twins full; do \
	  $(BIN)/python tests/end_to_end/kill_at_random.py --times $(KILLS) --by $$by || exit 1; done

parity: $(STAMP)
	$(BIN)/python -m pytest tests/parity -q

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The site: build/site/index.html"

notebooks: $(STAMP)
	$(BIN)/python notebooks/run.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
