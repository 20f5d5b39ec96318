# Every target installs what it needs first. PYTHON is only used to make the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DEMO_PROMPT := def main(argv=None):

.PHONY: setup demo test test-fast lint format bench chaos clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# Prepare, train with two workers, validate, generate; MLflow store in runs/.
demo: setup
	$(BIN)/python -m ray_jobs.prepare src=builtin
	$(BIN)/python -m ray_jobs.train config=configs/debug.yaml
	@echo
	@echo "A sample, continuing '$(DEMO_PROMPT)':"
	@echo
	@$(BIN)/python -m ray_jobs.generate ckpt=runs/debug_modular prompt='$(DEMO_PROMPT)' \
		max_tokens=200 temperature=0.8 top_k=40
	@echo
	@echo "Look at the run:  $(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db"
	@echo "and open          http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"

test: setup
	$(BIN)/python -m pytest -m "not chaos"

test-fast: setup
	$(BIN)/python -m pytest -m "not (slow or e2e or slurm or chaos)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each benchmark prints a table and writes JSON to benchmarks/results/ (not in git).
bench: setup
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.order
	$(BIN)/python -m benchmarks.layout
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.modular
	$(BIN)/python -m benchmarks.numerics
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.recall
	$(BIN)/python -m benchmarks.toy_lm

# Long randomised fault runs, outside CI.
chaos: setup
	$(BIN)/python -m pytest -m chaos

clean:
	rm -rf $(VENV) build dist *.egg-info
