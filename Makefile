PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .venv-ecosystem
OLDEST := .venv-oldest-torch
DEMO := model_cards/demo

.PHONY: demo test slow oldest ecosystem lint clean

demo: $(VENV)/.installed ## convert the demo checkpoint, verify it, generate with it, and let a model remember
	$(BIN)/olmem convert $(DEMO)/native/step1872 build/demo --overwrite
	$(BIN)/python $(DEMO)/generate.py build/demo
	$(BIN)/python $(DEMO)/remember.py model_cards/passkey

test: $(VENV)/.installed-test ## what needs no network and no GPU, but for the slow tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

slow: $(VENV)/.installed-test ## what takes long: compilers, exports, interpreted kernels, processes, long texts
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

oldest: $(OLDEST)/.installed ## the tests with the oldest torch and Transformers, slow ones too
	$(OLDEST)/bin/python -m pytest -q -n 2 --dist worksteal -m ''

ecosystem: $(TOOLS)/.installed ## every tool that Olmem is used with, in an environment of its own; writes the table
	$(TOOLS)/bin/python -m pytest -q -n 2 --dist loadfile tests/ecosystem --compatibility docs/compatibility.md

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(OLDEST) $(TOOLS) build dist

$(VENV)/.installed: pyproject.toml .constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "olmem needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .constraints.txt --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .constraints.txt --editable '.[$*]'
	touch $@

# The interpreter of Triton 3.6, which torch 2.11 brings with it, takes no newer NumPy.
$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' \
		'torch==2.11.0' 'numpy<2.4' 'transformers==5.17.0' 'huggingface_hub==1.33.0'
	touch $@

$(TOOLS)/.installed: pyproject.toml .constraints-ecosystem.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .constraints-ecosystem.txt --editable '.[ecosystem]'
	touch $@
