# Everything is built in .venv, by the first command that needs it; a second call reuses it.
# Needs only make and Python >= 3.11 (PYTHON=python3.12 make demo picks another one).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := api extract cache heads pipelines
# Tests in two processes, file by file, the longest first (tests/conftest.py). Each with one thread: more threads than cores wait
# for each other by spinning, and heads of small matrices take ten times as long.
TESTS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
# A strict editable install links every file by name, so it is repeated when the list of files changes, or
# what is compiled, and only then. There is one mark, of the last install: after a list that comes back,
# such as that of another branch, it is repeated too.
FILES := $(sort $(shell find $(FOLDERS) -type f ! -name '*.pyc'))
STATE := $(shell (echo $(FILES); cat pyproject.toml constraints.txt heads/linear/solver/*.c) | cksum | cut -d' ' -f1)
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt --config-settings editable_mode=strict

.PHONY: demo test quick lint types docs wheel dev bench clean help

help:            ## list the words
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.demo-$(STATE)    ## real solar cells, a pretrained network, hundreds of heads, a leaderboard
	$(BIN)/headrace demo

test: lint types                ## lint, types, all tests, the built wheel from another folder
	$(TESTS) --durations 40
	$(MAKE) --no-print-directory wheel

quick: dev                      ## the fast tests
	$(TESTS) -m "not slow"

lint: dev                       ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev                      ## mypy, strict
	$(BIN)/mypy $(FOLDERS)

dev: $(VENV)/.dev-$(STATE)      ## the environment for development

docs: dev                       ## the site: docs/_site/index.html; its generated pages are written again first
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_site

wheel: dev                      ## build the wheel, install it into a clean environment, try it from another folder
	sh tests/try_wheel.sh $(BIN)

bench: dev                      ## the small size of every benchmark
	for file in benchmarks/extraction.py benchmarks/cache.py benchmarks/heads.py benchmarks/report.py benchmarks/cluster.py benchmarks/small_runs.py; do $(BIN)/python $$file --quick || exit 1; done

$(BIN)/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headrace needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv

$(VENV)/.demo-$(STATE): $(BIN)/uv
	@echo "Installing headrace and its demo into $(VENV) (about 6.3 GB, most of it torch)"
	$(INSTALL) -e '.[demo]'
	@rm -f $(VENV)/.demo-* $(VENV)/.dev-*
	@touch $@

$(VENV)/.dev-$(STATE): $(BIN)/uv
	@echo "Installing headrace for development into $(VENV) (about 7.4 GB, most of it torch)"
	$(INSTALL) -e '.[demo,dev,docs]'
	@rm -f $(VENV)/.demo-* $(VENV)/.dev-*
	@touch $@ $(VENV)/.demo-$(STATE)

clean:                          ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info
