# `make run paper=m3vit` and `make test` need nothing but Python 3.11 to 3.13 and a network for the first call.
PYTHON ?= python3
PY := .venv/bin/python
paper ?= m3vit
args ?=

.PHONY: run test lint smoke table verdicts compare bench

run: .venv/installed
	$(PY) run.py paper=$(paper) $(args)

test: .venv/installed
	$(PY) -m pytest $(args)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

smoke: .venv/installed
	$(PY) run.py -m 'paper=glob(*)' scale=smoke control=true tracking=none

table: .venv/installed
	$(PY) -m shared.report.cards
	$(PY) -m shared.compare.leaderboard

verdicts: .venv/installed
	$(PY) -m shared.compare.changelog $(or $(old),-) results

compare: .venv/installed
	$(PY) compare.py $(or $(args),outputs)

bench: .venv/installed
	$(PY) -m shared.compare.bench $(args)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
