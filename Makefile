# Two commands need nothing before them: `make repro` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

.PHONY: repro test test-slow lint clean
.DEFAULT_GOAL := help

help:
	@echo "make repro     environment, base, data, then the whole pipeline; ends with the path of the report"
	@echo "make test      environment and the fast tests"
	@echo "make test-slow the slow tests"
	@echo "make lint      ruff and mypy"

# constraints.txt pins what is known to work together.
$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

repro: $(BIN)/.installed
	svdiff sync
	python -m flows init
	dvc repro $$(dvc stage list --name-only | grep -m1 '^sample@')  # the first concept's pictures, soon
	dvc repro
	@echo "report: $(CURDIR)/out/report/index.html"

test: $(BIN)/.installed
	python -m pytest -m "not slow"

test-slow: $(BIN)/.installed
	python -m pytest -m slow

lint: $(BIN)/.installed
	ruff check .
	ruff format --check .
	mypy

clean:
	rm -rf $(VENV) out .svdiff
