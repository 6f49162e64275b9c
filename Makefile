# demo and test set up what they need; a second call starts at once.
#   make setup PYTHON=python3.12              another interpreter (3.11 to 3.14)
#   make setup TORCH="torch==2.4.1 torchvision==0.19.1"      another pair
#   make test PYTEST_ARGS="tests/losses -k ghm" WORKERS=0    one process, no workers
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_CERT, ...) are respected.

# The first interpreter that the project is tested with, else python3.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
	2>/dev/null && echo $$p && exit; done; echo python3)
# Named in one pip command: a torchvision says which torch it works with, torch does not.
TORCH ?= torch torchvision
DEMO_CONFIG ?= configs/quick_schedules/mask_rcnn_R_18_eql_mini_lvis_demo.yaml
DEMO_OUTPUT ?= output/demo
BENCH_OUTPUT ?= output/bench
BENCH_PAGE ?= benchmarks/README.md
PYTEST_ARGS ?=
# Processes that share the tests; `auto` is one per core. Each computes on one thread.
WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

CHECK_VERSION := import sys; v = sys.version_info[:2]; \
	v < (3, 11) and sys.exit("Python %d.%d is too old, 3.11 to 3.14 are supported: PYTHON=..." % v)
CHECK_PAIR := import torch, torchvision; \
	torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)

.PHONY: help setup demo test test-slow test-faults coverage lint type words docs findings bench bench-lvis bench-gpu bench-long clean

help:
	@echo "make demo    set up, train the built-in mini_lvis set with EQL, evaluate ($(DEMO_OUTPUT))"
	@echo "make test    set up, run the tests but the slow ones"
	@echo "make test-slow     the others: whole trainings, every config of Detectron2's zoo"
	@echo "make test-faults   only the faults: full disk, corrupt files, killed processes"
	@echo "make coverage      the tests, with the lines that none of them runs"
	@echo "make setup   $(VENV) with torch, torchvision, this package and Detectron2"
	@echo "make lint    ruff check, ruff format --check, mypy and the words; make type, make words alone"
	@echo "make docs    the pages in site/, every link checked"
	@echo "make findings      surprises of other libraries, seen again: minutes, installs packages"
	@echo "make bench   cost of losses and training steps: tables in $(BENCH_OUTPUT) and"
	@echo "             in $(BENCH_PAGE) (BENCH_PAGE= leaves that as it is)"
	@echo "make bench-lvis    evaluation, analysis and training start at LVIS v1's size, beside peers"
	@echo "make bench-gpu     GPU tests, losses and training steps on a CUDA device"
	@echo "make bench-long    the benchmarks that train or evaluate for long"
	@echo "make clean   remove $(VENV) and caches; output/ and datasets/ stay"

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py d2_balance/cli/install_detectron2.py d2_balance/cli/detectron2-864913f.sha1
	@if [ ! -e $(VENV) ]; then \
		$(PYTHON) -c '$(CHECK_VERSION)' && $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c '$(CHECK_VERSION)' || { \
		echo "$(VENV) cannot be used. make clean removes it; the next call makes a new one."; \
		exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH) -e '.[detectron2,test]'
	@# opencv-python needs libGL, which a machine without a desktop may lack.
	@$(BIN)/python -c 'import cv2' 2>/dev/null || \
		$(BIN)/python -m pip install --force-reinstall --no-deps opencv-python-headless
	@$(BIN)/python -c '$(CHECK_PAIR)' || { \
		echo "This torch and torchvision do not work together. Name a pair, for example"; \
		echo "  make setup TORCH=\"torch==2.4.1 torchvision==0.19.1\""; exit 1; }
	$(BIN)/d2-balance install-detectron2
	@touch $@
	@echo "Set up in $(VENV). $(BIN)/d2-balance doctor shows what is there."

demo: $(STAMP)
	$(BIN)/python train_net.py --resume --config-file $(DEMO_CONFIG) \
		OUTPUT_DIR $(DEMO_OUTPUT)

test: $(STAMP)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-faults: $(STAMP)
	$(PYTEST) -m faults $(PYTEST_ARGS)

coverage: $(STAMP)
	$(PYTEST) --cov --cov-report=term --cov-report=html:output/coverage $(PYTEST_ARGS)

lint: $(STAMP) type words
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

words: $(STAMP)
	$(BIN)/python -m pytest tests/test_words.py

docs: $(STAMP)
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The pages lie in site/; open site/index.html."

# Each script has an environment of its own in a temporary directory; those with torch share one.
findings:
	@shared=$$(mktemp -d); trap 'rm -rf "$$shared"' EXIT; export FINDINGS_TORCH=$$shared/torch; \
	failed=; for script in findings/*.sh; do \
		echo "== $$script"; bash $$script || failed="$$failed $$script"; done; \
	[ -z "$$failed" ] || { echo "changed, or could not run:$$failed"; exit 1; }

# Tables and JSON of each lie in $(BENCH_OUTPUT); under 15 minutes on two idle cores.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	@mkdir -p $(BENCH_OUTPUT)
	@run() { name=$$1; shift; echo "== benchmarks/bm_$$name.py"; \
		$(BIN)/python benchmarks/bm_$$name.py "$$@" --json $(BENCH_OUTPUT)/$$name.json \
		> $(BENCH_OUTPUT)/$$name.md || exit 1; cat $(BENCH_OUTPUT)/$$name.md; }; \
	run losses --repeat 3 --plots $(BENCH_OUTPUT); \
	run train --repeat 7 --size 192
	@[ -z "$(BENCH_PAGE)" ] || \
		$(BIN)/python benchmarks/performance_page.py $(BENCH_OUTPUT) --page $(BENCH_PAGE)

# Evaluation, analysis and training start on files of LVIS v1's size, under 20 minutes on two cores.
# BEFORE=DIRECTORY runs the same commands from a checkout of another version too.
bench-lvis: $(STAMP)
	@mkdir -p $(BENCH_OUTPUT)
	$(BIN)/python benchmarks/bm_lvis_size.py --json $(BENCH_OUTPUT)/lvis_size.json \
		--page docs/performance.md $(if $(BEFORE),--before $(BEFORE))

# What a GPU decides; 6 minutes after the set-up.
bench-gpu: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make bench-gpu \
	needs a CUDA device, and none is visible")'
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	@mkdir -p $(BENCH_OUTPUT)
	$(PYTEST) -m gpu
	$(BIN)/python benchmarks/bm_losses.py --compiled --shapes "100,000 x 80, 300" "8,192 x 1,203" \
		--json $(BENCH_OUTPUT)/losses_gpu.json
	$(BIN)/python benchmarks/bm_train.py --depth 50 --size 640 --batch 2 --repeat 5 \
		--only stock Focal EQL GHMC DR AP Seesaw --json $(BENCH_OUTPUT)/train_gpu.json

# What trains or evaluates for long.
bench-long: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	@mkdir -p $(BENCH_OUTPUT)
	$(BIN)/python benchmarks/bm_quick.py
	$(BIN)/python benchmarks/bm_evaluation.py
	$(BIN)/python benchmarks/bm_ensemble.py
	$(BIN)/python benchmarks/classification_longtail.py
	$(BIN)/python benchmarks/bm_methods.py $(BENCH_OUTPUT)/methods.json

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
