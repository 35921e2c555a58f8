# Commands for a checkout. Each one installs the Python environment first if it is missing or out of date.
python := .venv/bin/python
SHELL := bash
.SHELLFLAGS := -o pipefail -c
# Two lanes write to one terminal, line by line.
lines := sed --unbuffered ''

.PHONY: help demo check test test-quick test-unit test-cluster test-gpu cluster down setup lint manifests lock
help:      ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: cluster   ## a small DistillRun on the development cluster, from helm install to a trained student
	@$(python) -m demo

check: setup    ## lint and the unit tests that start no server, engine or cluster: three minutes, no root, no Go
	@$(MAKE) --no-print-directory --keep-going --jobs=2 lint test-quick
test-quick: setup
	@$(python) -m pytest tests/unit -m "not server and not engine and not cluster" | $(lines)

# The cluster's tests mostly wait, so the unit tests run beside them. Whole runs come after both: they compute.
test: lint      ## lint and all tests except those that need a GPU
	@$(MAKE) --no-print-directory --keep-going --jobs=2 test-unit test-cluster
	@$(python) -m pytest tests/e2e
test-unit: setup
	@$(python) -m pytest tests/unit tests/gpu | $(lines)
test-cluster: setup
	@$(python) -m pytest tests/devcluster tests/cluster | $(lines)

test-gpu: setup ## the tests that need a GPU: an NVIDIA GPU, and PyTorch for CUDA in .venv
	@$(python) -m pytest tests/gpu -m gpu

cluster: setup  ## start the development cluster
	@$(python) -m devcluster up

down: setup     ## end the development cluster and remove its state
	@$(python) -m devcluster down

setup: .venv/requirements.lock
.venv/requirements.lock: requirements.lock .ci/venv
	@.ci/venv

lint: setup     ## ruff, mypy, import layers, declared dependencies, shell scripts, links in the documentation
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
	@.venv/bin/uv pip compile --quiet --python-version 3.12 --all-extras --generate-hashes --no-emit-index-url --no-header pyproject.toml -o requirements.lock
