# `make help` lists the targets. Each sets up .venv itself, and again only when requirements.lock has changed.
ready := .venv/.ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# If it is set, every script compiles torch and transformers again, which takes longer than importing them.
unexport PYTHONDONTWRITEBYTECODE
# Processes that share the tests, one thread each. All tests of a file run in one process and share its fixtures.
WORKERS := 2
pytest := OMP_NUM_THREADS=1 python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-fast test-gpu lint soak bench ladder pictures lock
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(ready) ## run a whole contest on the bundled model: CPU only, offline
	rm -rf data/demo checkpoints/demo outputs/demo
	python data/make_demo.py
	HF_HUB_DISABLE_PROGRESS_BARS=1 EXPERIMENTS_LOG=experiments/demo.csv LABELS=data/demo/test_answers.csv \
		JOBS=3 bash run.sh args/demo

test: $(ready) ## run all tests that need no GPU
	$(pytest) -m "not gpu"

test-fast: $(ready) ## run the tests that take no training, in under a minute
	$(pytest) -m "not gpu and not slow"

test-gpu: $(ready) ## run the tests that need one or two CUDA GPUs
	python -m pytest -q tests/gpu

lint: $(ready) ## check style, format and types
	ruff check .
	ruff format --check .
	mypy

soak: $(ready) ## kill and resume a fold of the demo ten times; SOAK="--kills 3 --seed 7" changes that
	test -f data/demo/train.csv || python data/make_demo.py
	python make_folds.py args/demo/fold0.json
	python tests/soak.py $(SOAK)

bench: $(ready) ## measure EMA, folds and permutations on a contest of 20,000 rows: hours on two cores, minutes on a GPU
	python benchmarks/ladder.py --rungs EMA SWA "3 folds, 4 permutations" $(LADDER)

ladder: $(ready) ## measure every technique over three seeds, on GPUs: LADDER="--gpus 4 --jobs 20"; continues where it stopped
	python benchmarks/ladder.py $(LADDER)

pictures: $(ready) ## draw the pictures of the README and docs/ again; needs chromium and a finished demo
	python docs/make_pictures.py --pages

$(ready): requirements.lock
	python3 -m venv .venv
	command -v uv >/dev/null || .venv/bin/python -m pip install -q uv
	uv pip install -q --python .venv/bin/python -r requirements.lock
	touch $(ready)

lock: ## pin the newest versions that requirements-dev.txt allows
	uv pip compile -q --universal --python-version 3.11 requirements-dev.txt -o requirements.lock
