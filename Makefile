# The README's two commands. Both make the environment they need in .venv first, and again when its pins change.
PYTHON ?= python3.11
PORT ?= 8180
METRICS_PORT ?= 8181
REDIS_PORT ?= 8182

PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test

serve: .venv/.installed-cli
	.venv/bin/millrace serve --demo --port $(PORT) --metrics-port $(METRICS_PORT) --engine-worker-queue-port $(REDIS_PORT)

test: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest

.venv/.installed-%: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) --editable '.[$*]'
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.PRECIOUS: .venv/.installed-%
