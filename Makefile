PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo docs notebooks test test-all lint format test-versions interop bench torture clean

demo: $(VENV)/ready
	bash demo.sh $(BIN)/python

# docs/flags.md and docs/zh/flags.md, from the options of train.py.
docs:
	$(PYTHON) docs/make_flags.py

# learn_bone.ipynb and learn_bone.zh.ipynb, with the outputs of a new run.
notebooks: $(VENV)/ready
	$(BIN)/python docs/make_notebooks.py

# What a newcomer runs once: lint, and all tests but the exhaustive ones.
test: lint
	$(BIN)/python -m pytest -q -n 2 -m "not exhaustive"

test-all: lint
	$(BIN)/python -m pytest -q -n 2

# The rules of CONTRIBUTING.md, as far as a command checks them.
lint: $(VENV)/ready
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/clang-format --dry-run -Werror $(wildcard *.cpp *.cu *.h)
	$(BIN)/mypy $(filter-out test_%.py,$(wildcard *.py))
	$(BIN)/python -m pytest -q test_house.py

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard *.cpp *.cu *.h)
	$(BIN)/ruff check --fix .

# The oldest PyTorch that requirements.txt admits, to the newest: tests, libraries, fake GPU
# tensors.
test-versions:
	$(PYTHON) versions.py

# The programs that read what is written here: web-rwkv (the engine of Ai00) on Mesa's software GPU
# driver, the rwkv package (that of RWKV Runner), RWKV-PEFT's format.
DRIVER = /usr/share/vulkan/icd.d/lvp_icd.*

interop: $(VENV)/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check web-rwkv-py -c constraints.txt
	ls $(DRIVER) >/dev/null 2>&1 || { \
	    sudo=$$(command -v sudo || true); \
	    $$sudo apt-get update -q && $$sudo apt-get install -q -y mesa-vulkan-drivers; }
	LP_NUM_THREADS=0 XDG_RUNTIME_DIR=$${XDG_RUNTIME_DIR:-/tmp} \
	    VK_ICD_FILENAMES=$$(echo $(DRIVER)) \
	    $(BIN)/python -m pytest -q -rP test_interop.py -k web_rwkv
	$(BIN)/python -m pytest -q test_interop.py test_rwkv6.py \
	    -k "rwkv_package or go_both_ways or st_file"

bench: $(VENV)/ready
	$(BIN)/python bench.py

# A quarter of an hour of kills, damaged files and a full disk.
torture: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python torture.py

$(VENV)/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check \
	    -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-versions demo
