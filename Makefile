# Two commands do everything on a machine that has Python (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: chat test lint tables demo-models gpu-check clean

chat: $(STAMP)  ## talk to the bundled model with only half of its weights in memory
	@$(BIN)/offload chat --resident 50%

test: $(STAMP)  ## the whole suite
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(STAMP)  ## style, types and the layering of the packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

tables: $(STAMP)  ## make the README's tables from bench/results/*.json
	@$(BIN)/python bench/tables.py

gpu-check:  ## tests and a short benchmark on a CUDA device; uses the Python at hand, installs nothing
	@PYTHONPATH=. $(PYTHON) bench/gpu_check.py

demo-models: $(STAMP)  ## train the bundled models again (about half an hour on two cores)
	@$(BIN)/python tools/demo_models/train.py --out offload/models

# torch goes first and pinned: left to itself, pip takes the newest build with gigabytes of CUDA
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
