# The README's commands. They make the environment they need in .venv first, and again when its pins change.
PYTHON ?= python3.11
PORT ?= 8180
METRICS_PORT ?= 8181
REDIS_PORT ?= 8182

PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test chaos

serve: .venv/.installed-cli
	.venv/bin/millrace serve --demo --port $(PORT) --metrics-port $(METRICS_PORT) --engine-worker-queue-port $(REDIS_PORT)

test: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest

# Every crash point (POINTS=none: leave that out), then seeds of chaos; the last line is their totals.
SEEDS ?= 4
FIRST_SEED ?= 1
SECONDS ?= 60
CLIENTS ?= 16
POINTS ?= all

chaos: .venv/.installed-test
	failed=0; \
	test $(POINTS) = none || CHAOS_ALL=1 .venv/bin/pytest tests/chaos/test_crash_points.py || failed=1; \
	PYTHONPATH=.:tests:tests/chaos .venv/bin/python -m chaos_storm --seeds $(SEEDS) --first-seed $(FIRST_SEED) \
		--seconds $(SECONDS) --clients $(CLIENTS) && exit $$failed

.venv/.installed-%: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) --editable '.[$*]'
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.PRECIOUS: .venv/.installed-%
