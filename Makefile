PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .venv-ecosystem
DEMO := model_cards/demo

.PHONY: demo test ecosystem lint clean

demo: $(VENV)/.installed ## convert the demo checkpoint, verify it, generate with it
	$(BIN)/olmem convert $(DEMO)/native/step1872 build/demo --overwrite
	$(BIN)/python $(DEMO)/generate.py build/demo

test: $(VENV)/.installed-test ## everything that needs no network and no GPU
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

ecosystem: $(TOOLS)/.installed ## every tool that Olmem is used with, in an environment of its own; writes the table
	$(TOOLS)/bin/python -m pytest -q -n 2 --dist loadfile tests/ecosystem --compatibility docs/compatibility.md

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(TOOLS) build dist

$(VENV)/.installed: pyproject.toml .constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "olmem needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .constraints.txt --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .constraints.txt --editable '.[$*]'
	touch $@

$(TOOLS)/.installed: pyproject.toml .constraints-ecosystem.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .constraints-ecosystem.txt --editable '.[ecosystem]'
	touch $@
