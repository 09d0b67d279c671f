# `make` alone lists the targets. Everything runs in .venv, which `setup` creates.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CLI := $(VENV)/bin/qwen3vl-onnx
STAMP := $(VENV)/.installed
CHECKPOINT := builder/miniature/checkpoint
BUNDLES := outputs/miniature-fp32/8-bundle
NPM := builder/targets/runners/js
IMAGE := builder/miniature/heldout/pic002.png
# Results of `test-full`, from which docs/test-full.md is generated.
RESULTS := outputs/test-full.xml
SIZE ?= 2b 4b

.PHONY: help setup node runtimes build explain verify check test test-full bench bench-runtime matrix clean
.DEFAULT_GOAL := help

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[build,dev]"
	@touch $@

node: .node/.installed ## install pinned npm packages into .node, to run bundles for transformers.js; needs npm

# To try another release: `npm update --package-lock-only --omit-lockfile-registry-resolved` in $(NPM).
.node/.installed: $(NPM)/package.json $(NPM)/package-lock.json
	@mkdir -p .node && cp $(NPM)/package.json $(NPM)/package-lock.json .node/
	cd .node && ONNXRUNTIME_NODE_INSTALL=skip npm ci --no-audit --no-fund
	@touch $@

build: setup ## build the miniature, verify it, run it on an image
	$(CLI) build
	$(CLI) run $(BUNDLES)/genai --image $(IMAGE) --prompt "Read the number."

explain: setup ## which stages of the miniature's build would run, and why
	$(CLI) explain

verify: setup ## compare the miniature's bundles with PyTorch again
	$(CLI) verify $(BUNDLES)/genai --reference $(CHECKPOINT)
	$(CLI) verify $(BUNDLES)/onnxruntime --reference $(CHECKPOINT)

check: setup ## style, types, and fast tests without torch; under a minute
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy & types=$$!; $(PY) -m pytest -q -m "not torch and not slow and not seconds" -n logical --dist worksteal \
	&& wait $$types

# Tests that `check` runs in the same command are not repeated.
test: setup ## all tests but the slow ones
	$(PY) -m pytest -q -n logical --dist loadfile $(if $(filter check,$(MAKECMDGOALS)),-m "(torch or seconds) and not slow")

test-full: setup ## all tests, in every runtime (needs `make node runtimes`, Chromium); writes docs/test-full.md
	@mkdir -p docs outputs && rm -f $(RESULTS)
	status=0; EVERY_RUNTIME=1 $(PY) -m pytest -q -m "" -n logical --dist loadfile --junitxml=$(RESULTS) || status=$$?; \
	$(PY) -m tests.tables $(RESULTS) > docs/test-full.md && exit $$status

runtimes: setup node ## install the other runtimes: openvino, and onnxruntime-node for examples/node
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[openvino]"
	ONNXRUNTIME_NODE_INSTALL=skip npm --prefix examples/node ci --no-audit --no-fund

bench: setup ## measure builds at real sizes (SIZE=8b for the largest), compared with other tools; writes docs/bench.md
	$(PY) -m bench $(addprefix --size ,$(SIZE))

bench-runtime: setup ## measure the speed of artifacts at the 2B size, compared with other tools; writes docs/bench-runtime.md
	$(PY) -m bench.runtime

matrix: setup ## build and verify on the oldest and the newest supported releases; writes docs/matrix.md
	$(PY) -m ci.matrix --write docs/matrix.md

clean: ## remove outputs and caches, but not .venv and .node
	rm -rf outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find bench builder ci patches tests -name __pycache__ -type d -prune -exec rm -rf {} +
