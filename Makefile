PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := model_cards/demo

.PHONY: demo test lint clean

demo: $(VENV)/.installed ## convert the demo checkpoint, verify it, generate with it
	$(BIN)/olmem convert $(DEMO)/native/step1872 build/demo --overwrite
	$(BIN)/python $(DEMO)/generate.py build/demo

test: $(VENV)/.installed-test ## everything that needs no network and no GPU
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist

$(VENV)/.installed: pyproject.toml .constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "olmem needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .constraints.txt --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .constraints.txt --editable '.[$*]'
	touch $@
