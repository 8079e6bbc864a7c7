# `make quickstart` and `make test` need git, make and Python >= 3.11 (PYTHON=... names one);
# they make .venv and install into it what is not there yet.
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast lint format core dev
export PYTHON
RUN := runs/quickstart
BIN := .venv/bin

help:
	@echo "make quickstart   train a captioner on the embedded corpus and write $(RUN)/report.html"
	@echo "make test         every check and test"
	@echo "make test-fast    the tests that take seconds"
	@echo "make lint         ruff, pyrefly and the direction of imports"
	@echo "make format       let ruff mend what it can"

quickstart: core
	$(BIN)/capjax train --config=emoji_quickstart --workdir=$(RUN)
	$(BIN)/capjax report --workdir=$(RUN)

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

format: dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

core dev:
	@tools/environment.sh $@
