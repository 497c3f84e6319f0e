# make demo: distil the embedded FLUX teacher, sample, measure, and leave a picture, a table, a report.
# make demo-all: the eight recipes on their embedded teachers, and one table of all.
# make test: the test suite. make test-oldest: a part of it with the oldest versions that setup.py promises.
# All make their own virtual environment in $(VENV) and install first.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
PROCESSES ?= 2
BIN := $(VENV)/bin
# The embedded networks are too small for threads: processes with one thread each.
export OMP_NUM_THREADS ?= 1
INSTALLED := $(VENV)/.installed

OLDEST := .venv-oldest

.PHONY: demo demo-all test test-all test-oldest lint clean

$(INSTALLED): requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar off -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

TINY := assets/tiny/flux
TRAIN := PYTHON=$(BIN)/python sh
DATA = paths.dataset=$(RUN)/data/data.json

demo: export CUDA_VISIBLE_DEVICES =
demo: $(INSTALLED)
	$(BIN)/python -m senseflow.tiny.pictures --output $(RUN)/data --num 4000
	$(TRAIN) exp_flux/train_flux_senseflow.sh 1 $(PROCESSES) \
		configs/FLUX/flux_senseflow_tiny.yaml $(RUN)/run $(DATA)
	$(BIN)/python scripts_flux/test_flux_senseflow.py --flux_ckpt $(TINY)/pipeline \
		--checkpoint $(RUN)/run --prompts_file $(RUN)/data/prompts_heldout.txt \
		--num_prompts 16 --batch_size 16 --output_dir $(RUN)/images
	$(BIN)/python scripts_flux/test_flux_senseflow.py --flux_ckpt $(TINY)/pipeline --teacher \
		--height 32 --width 32 --prompts_file $(RUN)/data/prompts_heldout.txt \
		--num_prompts 16 --batch_size 16 --output_dir $(RUN)/images_teacher
	$(BIN)/python -m senseflow.report $(RUN)/run --output $(RUN)/report.html \
		--teacher_images $(RUN)/images_teacher --student_images $(RUN)/images
	$(BIN)/python -m senseflow.tiny.measure --pipeline $(TINY)/pipeline --common assets/tiny/common \
		--student student=$(RUN)/run --seeds 2 --processes $(PROCESSES) --output $(RUN)/report
	@echo "the table: $(RUN)/report/table.md   the picture: $(RUN)/report/comparison.png"
	@echo "the report of the run: $(RUN)/report.html"

demo-all: export CUDA_VISIBLE_DEVICES =
demo-all: $(INSTALLED)
	$(BIN)/python -m senseflow.tiny.pictures --output $(RUN)/data --num 4000
	$(TRAIN) exp_flux/train_flux_senseflow.sh 1 1 configs/FLUX/flux_senseflow_tiny.yaml $(RUN)/flux $(DATA)
	$(TRAIN) exp_sdxl/train_sdxl_senseflow.sh 1 1 configs/sdxl/sdxl_senseflow_tiny.yaml $(RUN)/sdxl $(DATA)
	$(TRAIN) exp_sdxl/train_sdxl_dmd2.sh 1 1 configs/sdxl/sdxl_dmd2_tiny.yaml $(RUN)/dmd2 $(DATA)
	$(TRAIN) exp_sd35/train_SD35_senseflow.sh 1 1 configs/SD35/sd35_senseflow_tiny.yaml \
		$(RUN)/sd35 $(DATA)
	$(TRAIN) exp_sd35/train_SD35_large_senseflow.sh 1 1 configs/SD35/sd35_large_senseflow_tiny.yaml \
		$(RUN)/sd35_large $(DATA)
	$(TRAIN) exp_flux2/train_flux2_klein_senseflow.sh 1 1 configs/FLUX2/flux2_klein_senseflow_tiny.yaml \
		$(RUN)/flux2_klein $(DATA)
	$(TRAIN) exp_z_image/train_z_image_senseflow.sh 1 1 configs/Z-Image/z_image_senseflow_tiny.yaml \
		$(RUN)/z_image $(DATA)
	$(TRAIN) exp_qwen_image/train_qwen_image_senseflow.sh 1 1 \
		configs/Qwen-Image/qwen_image_senseflow_tiny.yaml $(RUN)/qwen_image $(DATA)
	$(BIN)/python -m senseflow.tiny.compare --common assets/tiny/common --processes $(PROCESSES) \
		--num_prompts 500 --seeds 2 --output $(RUN)/all \
		--pair "FLUX" assets/tiny/flux/pipeline $(RUN)/flux \
		--pair "SDXL" assets/tiny/sdxl/pipeline $(RUN)/sdxl \
		--pair "SDXL, DMD2" assets/tiny/sdxl/pipeline $(RUN)/dmd2 \
		--pair "SD3.5 Medium" assets/tiny/sd35_medium/pipeline $(RUN)/sd35 \
		--pair "SD3.5 Large" assets/tiny/sd35_large/pipeline $(RUN)/sd35_large \
		--pair "FLUX.2-klein" assets/tiny/flux2_klein/pipeline $(RUN)/flux2_klein \
		--pair "Z-Image" assets/tiny/z_image/pipeline $(RUN)/z_image \
		--pair "Qwen-Image" assets/tiny/qwen_image/pipeline $(RUN)/qwen_image
	@echo "the table: $(RUN)/all/table.md   the picture: $(RUN)/all/comparison.png"

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m '' -n $(PROCESSES) --dist loadfile

test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet uv
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct \
		-r setup.py --extra test
	$(OLDEST)/bin/python -m pytest -m '' -n $(PROCESSES) --dist loadfile \
		tests/core tests/optim tests/distill tests/engine tests/plan tests/test_training.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info
