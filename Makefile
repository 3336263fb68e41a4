# `make pretrain` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv pretrain test lint bench docs gpu

venv: $(STAMP)

# torch comes first and pinned: pip then takes the CPU build where one is at hand
$(STAMP): setup.py setup.cfg pyproject.toml constraints.txt $(wildcard kernels/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	mkdir -p $(VENV)/links
	ln -sfn ../../kernels $(VENV)/links/arb_kernels
	ln -sfn ../../scripts $(VENV)/links/arb_scripts
	touch $(STAMP)

pretrain: venv
	$(BIN)/python scripts/pretrain.py --resume_from_checkpoint auto $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# the numeric tests again, as on other CPUs: tests/support/run_settings.py --help
.PHONY: settings
settings: venv
	$(BIN)/python tests/support/run_settings.py $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: venv
	$(BIN)/python scripts/benchmark_true_ternary.py --json runs/benchmark_true_ternary.json
	$(BIN)/python scripts/bench_kernels.py --json runs/bench_kernels.json
	$(BIN)/python scripts/bench_train.py --json runs/bench_train.json
	$(BIN)/python scripts/bench_generate.py --json runs/bench_generate.json

docs: venv
	$(BIN)/python docs/tools/draw_figures.py
	$(BIN)/python docs/tools/draw_comparison.py
	$(BIN)/python docs/tools/write_reference.py
	$(BIN)/python docs/tools/build_api.py

# with the machine's own Python and torch: the pinned build has no GPU
gpu:
	$(PYTHON) scripts/developer/check_gpu.py $(ARGS)
