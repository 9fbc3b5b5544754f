# make demo: the whole job on the embedded default.  make test: the tests.  make lint: ruff.  make soak: kill and resume.
# make ladder: what each step of the way is worth.
# Each makes .venv itself, and leaves it alone while requirements.lock has not changed.
ready := .venv/.ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Where it is set, every script compiles torch and transformers anew, which takes longer than to import them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint soak ladder lock

demo: $(ready)
	rm -rf data/demo checkpoints/demo outputs/demo
	python data/make_demo.py
	EXPERIMENTS_LOG=experiments/demo.csv LABELS=data/demo/test_answers.csv JOBS=3 bash run.sh args/demo

test: $(ready)
	python -m pytest -q

soak: $(ready) # kill a fold of the demo ten times and compare; SOAK="--kills 3 --seed 7" for others
	test -f data/demo/train.csv || python data/make_demo.py
	python make_folds.py args/demo/fold0.json
	python tests/soak.py $(SOAK)

ladder: $(ready) # what each step of the way is worth; some fifteen minutes, and it goes on where it stopped
	python benchmarks/ladder.py $(LADDER)

lint: $(ready)
	ruff check .
	ruff format --check .

$(ready): requirements.lock
	python3 -m venv .venv
	command -v uv >/dev/null || .venv/bin/python -m pip install -q uv
	uv pip install -q --python .venv/bin/python -r requirements.lock
	touch $(ready)

lock: # pin anew what requirements.txt asks for
	uv pip compile -q --universal --python-version 3.11 requirements-dev.txt -o requirements.lock
