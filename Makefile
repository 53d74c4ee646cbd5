PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo test bench clean

demo: $(VENV)/ready
	bash demo.sh $(BIN)/python

test: $(VENV)/ready
	$(BIN)/python -m pytest -q

bench: $(VENV)/ready
	$(BIN)/python bench.py

$(VENV)/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) demo
