# make demo: distil the embedded FLUX teacher, sample, measure, and leave a picture and a table.
# make test: the test suite.  Both make their own virtual environment in $(VENV) and install first.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint clean

$(INSTALLED): requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar off -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

demo: $(INSTALLED)
	PYTHON=$(BIN)/python sh exp_flux/demo_tiny.sh $(RUN)

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m ''

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
