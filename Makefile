# Two commands need nothing before them: `make repro` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

.PHONY: repro test test-slow lint docs dag clean
.DEFAULT_GOAL := help

help:
	@echo "make repro     environment, base, data, then the whole pipeline; ends with the path of the report"
	@echo "make test      environment and the fast tests"
	@echo "make test-slow the slow tests"
	@echo "make lint      ruff and mypy"
	@echo "make docs      the docs site, in build/site; opens without a server"

# constraints.txt pins what is known to work together.
$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

repro: $(BIN)/.installed
	svdiff sync
	python -m flows init
	svdiff plan
	dvc repro $$(dvc stage list --name-only | grep -m1 '^sample@')  # the first concept's pictures, soon
	dvc repro
	@echo "report: $(CURDIR)/out/report/index.html"

# On all cores, up to four: each process holds torch and a server or two.
test: $(BIN)/.installed
	python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile

test-slow: $(BIN)/.installed
	python -m pytest -m slow

lint: $(BIN)/.installed
	ruff check .
	ruff format --check .
	mypy

docs: $(BIN)/.installed
	mkdocs build --strict --quiet

# The picture of the pipeline in docs/design.md: a box a stage, whatever its entries. Needs graphviz.
dag: $(BIN)/.installed
	dvc dag --dot | sed -E 's/@[^"]*"/"/g; s#data/concepts/[^"]*\.dvc#data/concepts#g; 1s/.*/digraph { rankdir=LR; nodesep=0.15; ranksep=0.3; node [shape=box style=rounded fontname="sans-serif" fontsize=12 height=0.3]; edge [color=gray50 arrowsize=0.6];/' \
		| awk '!seen[$$0]++' | dot -Tsvg > docs/pictures/pipeline.svg

clean:
	rm -rf $(VENV) out .svdiff
