# Each target does its own set-up: a virtual environment in .venv, versions pinned by
# constraints.txt. Later calls reuse it.
PYTHON ?= python3
BIN := .venv/bin
# What is installed beside the package. CI takes EXTRAS=buckets,dev,docs,gcs,gguf,hf,s3,tpu.
EXTRAS ?= dev
STAMP := .venv/.installed-$(EXTRAS)

.PHONY: demo test check docs faults help

help:
	@echo "make demo   grow a model through three stages into runs/demo (about 8 minutes, 2 cores)"
	@echo "make test   run the tests, but for the slow ones"
	@echo "make docs   build the documentation into docs/_build/html; a broken reference fails"
	@echo "make faults inject faults into small runs: kills, full disks, damage, .. (30 minutes, 2 cores)"
	@echo "make check  lint, format, types and all tests. With EXTRAS=buckets,dev,docs,gcs,gguf,hf,s3,tpu: what CI runs"

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable ".[$(EXTRAS)]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m experiments.train --config=configs/demo.py --workdir=runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -rs
	@echo "Installed extras: $(EXTRAS). A test that needs another one was skipped and is listed above."
	@echo "CI leaves none out: make check EXTRAS=buckets,dev,docs,gcs,gguf,hf,s3,tpu"

faults: $(STAMP)
	$(BIN)/python -m tests.faults $(ARGS)

docs:
	$(MAKE) .venv/.installed-$(EXTRAS),docs EXTRAS=$(EXTRAS),docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"
