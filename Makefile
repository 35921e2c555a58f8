# Commands for a checkout. Each one installs the Python environment first if it is missing or out of date.
python := .venv/bin/python
SHELL := bash
.SHELLFLAGS := -o pipefail -c
# Line-buffers a command's output, because parallel commands write to the same terminal.
lines := sed --unbuffered ''

.PHONY: help demo check test test-quick test-local test-engine test-cluster test-gpu cluster down setup lint
.PHONY: manifests lock
help:      ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: cluster   ## run a small DistillRun on the development cluster, from helm install to a trained student
	@$(python) -m demo

check: setup    ## run lint and the unit tests without server, engine or cluster: 3 minutes, no root, no Go
	@$(MAKE) --no-print-directory --keep-going --jobs=2 lint test-quick
test-quick: setup
	@$(python) -m pytest tests/unit -m "not server and not engine and not cluster" | $(lines)

# Three parts run in parallel. The tests with engines are a part of their own, because an engine needs 5 GB; the
# cluster's tests mostly wait. The end-to-end tests load the CPU and run last.
test: lint      ## run lint and all tests except those that need a GPU
	@$(MAKE) --no-print-directory --keep-going --jobs=3 test-cluster test-engine test-local
	@$(python) -m pytest tests/e2e
test-local: setup
	@$(python) -m pytest tests/unit tests/gpu -m "not engine" | $(lines)
test-engine: setup
	@$(python) -m pytest tests/unit -m engine | $(lines)
test-cluster: setup
	@$(python) -m pytest tests/devcluster tests/cluster | $(lines)

test-gpu: setup ## run the GPU tests: needs an NVIDIA GPU with a driver for CUDA 13
	@$(python) -m pytest tests/gpu -m gpu

cluster: setup  ## start the development cluster
	@$(python) -m devcluster up

down: setup     ## stop the development cluster and remove its state
	@$(python) -m devcluster down

setup: .venv/requirements.lock
.venv/requirements.lock: requirements.lock .ci/venv
	@.ci/venv

lint: setup     ## check with ruff, mypy, import-linter, deptry and shellcheck, and the links in docs/
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy
	@PYTHONPATH=.:operator .venv/bin/lint-imports
	@$(python) -m deptry .
	@$(python) docs/check_links.py
	@.venv/bin/shellcheck .ci/run .ci/venv

manifests: setup  ## write manifests/crd.yaml and docs/reference/api.md from vpmoe/api
	@$(python) -m vpmoe.api.crd >manifests/crd.yaml
	@$(python) -m vpmoe.api.reference >docs/reference/api.md

lock: setup     ## write requirements.lock from pyproject.toml
	@.venv/bin/uv pip compile --quiet --python-version 3.12 --all-extras --generate-hashes \
		--no-emit-index-url --no-header pyproject.toml -o requirements.lock
