# make demo: distil the embedded FLUX teacher, sample, measure, and leave a picture and a table.
# make test: the test suite.  Both make their own virtual environment in $(VENV) and install first.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
PROCESSES ?= 2
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

TINY := assets/tiny/flux

demo: export CUDA_VISIBLE_DEVICES =
demo: $(INSTALLED)
	$(BIN)/python -m senseflow.tiny.pictures --output $(RUN)/data --num 4000
	PYTHON=$(BIN)/python sh exp_flux/train_flux_senseflow.sh 1 $(PROCESSES) \
		configs/FLUX/flux_senseflow_tiny.yaml $(RUN)/run paths.dataset=$(RUN)/data/data.json
	$(BIN)/python scripts_flux/test_flux_senseflow.py --flux_ckpt $(TINY)/pipeline \
		--checkpoint $(RUN)/run --prompts_file $(RUN)/data/prompts_heldout.txt \
		--num_prompts 16 --batch_size 16 --output_dir $(RUN)/images
	$(BIN)/python -m senseflow.tiny.measure --pipeline $(TINY)/pipeline --common assets/tiny/common \
		--student student=$(RUN)/run --seeds 2 --threads $(PROCESSES) --output $(RUN)/report
	@echo "the table: $(RUN)/report/table.md   the picture: $(RUN)/report/comparison.png"

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
