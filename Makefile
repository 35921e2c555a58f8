# Everything that is done with a checkout. `make demo` and `make test` install what they need.
python := .venv/bin/python
SHELL := bash
.SHELLFLAGS := -o pipefail -c
# the tests of cluster and operator mostly wait, so the unit tests run beside them and share the screen by whole lines; whole runs do not
# wait, and take more memory than would be left beside others
lines := sed --unbuffered ''

.PHONY: help demo test test-unit test-cluster cluster down setup lint manifests lock
help:      ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: cluster   ## a small DistillRun from helm install to a trained student on the development cluster
	@$(python) -m demo

test: lint      ## all checks and tests, on real servers
	@$(MAKE) --no-print-directory --keep-going --jobs=2 test-unit test-cluster
	@$(python) -m pytest tests/e2e
test-unit: setup
	@$(python) -m pytest tests/unit | $(lines)
test-cluster: setup
	@$(python) -m pytest tests/devcluster tests/cluster | $(lines)

cluster: setup  ## the development cluster alone
	@$(python) -m devcluster up

down: setup     ## ends the development cluster and removes its state
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

manifests: setup  ## manifests/crd.yaml and docs/reference/api.md, from vpmoe/api
	@$(python) -m vpmoe.api.crd >manifests/crd.yaml
	@$(python) -m vpmoe.api.reference >docs/reference/api.md

lock: setup     ## requirements.lock, from pyproject.toml
	@.venv/bin/uv pip compile --quiet --python-version 3.12 --all-extras --generate-hashes --no-emit-index-url --no-header pyproject.toml -o requirements.lock
