# Commands for a checkout. Each one installs the Python environment first if it is missing or out of date.
python := .venv/bin/python
SHELL := bash
.SHELLFLAGS := -o pipefail -c
# Line-buffers a command's output, because parallel commands write to the same terminal.
lines := sed --unbuffered ''
chaos := tests/cluster/test_operator_chaos.py
kueue := tests/cluster/test_kueue.py
on_cpu := tests/kind/test_images.py::test_a_run_is_preprocessed_trained_and_evaluated_in_containers

# CLUSTER is dev (the default: compiled here), kind (a node in Docker) or current (kubectl's context).
ifeq ($(CLUSTER),kind)
export VARIANT := cpu
cluster: images
endif

.PHONY: help demo check test test-quick test-local test-engine test-cluster test-kind test-cuda-images test-gpu cluster kueue down setup lint
.PHONY: manifests lock images push
help:      ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: cluster   ## run a small DistillRun, from helm install to a trained student; CLUSTER=kind: with images in Docker
	@$(python) -m demo

check: setup    ## run lint and the unit tests without server, engine or cluster: 3 minutes, no root, no Go
	@$(MAKE) --no-print-directory --keep-going --jobs=2 lint test-quick
test-quick: setup
	@$(python) -m pytest tests/unit -m "not server and not engine and not cluster" | $(lines)

# Three parts run in parallel. The tests with engines are a part of their own, because an engine needs 5 GB; the
# cluster's tests mostly wait. The operator's chaos has a control plane of its own and follows the engines, and the
# end-to-end tests without a cluster follow it. Those on the cluster load the CPU and run last.
test: lint      ## run lint and all tests except those that need a GPU or Kueue
	@$(MAKE) --no-print-directory --keep-going --jobs=3 test-cluster test-engine test-local
	@$(python) -m pytest tests/e2e -m cluster
test-local: setup
	@$(python) -m pytest tests/unit tests/gpu -m "not engine" | $(lines)
test-engine: setup
	@$(python) -m pytest tests/unit -m engine | $(lines)
	@$(python) -m pytest $(chaos) | $(lines)
	@$(python) -m pytest tests/e2e -m "not cluster" | $(lines)
test-cluster: setup
	@$(python) -m pytest tests/devcluster tests/cluster --ignore $(chaos) --ignore $(kueue) | $(lines)

test-kueue: setup ## run the tests with Kueue on the development cluster; the first time it is compiled
	@$(python) -m pytest $(kueue)

test-kind: export CLUSTER := kind
test-kind: export VARIANT := cpu
test-kind: setup images ## build the images, test them, and run the end-to-end tests on kind; needs Docker
	@$(python) -m pytest tests/kind
	@$(python) -m pytest tests/e2e -m cluster

test-cuda-images: export VARIANT := cuda
test-cuda-images: setup images ## build the images for GPUs, and test what they hold and import; needs Docker, no GPU
	@$(python) -m pytest tests/kind --deselect $(on_cpu)

test-gpu: setup ## run the GPU tests: needs an NVIDIA GPU with a driver for CUDA 13
	@$(python) -m pytest tests/gpu -m gpu

cluster: setup  ## start the cluster: CLUSTER=dev (the default) or kind
	@$(python) -m devcluster up

kueue: setup    ## add Kueue to the development cluster, for runs with a queue
	@$(python) -m devcluster kueue

down: setup     ## stop the cluster, also with CLUSTER=kind, and remove its state
	@$(python) -m devcluster down

images:         ## build the images of this commit; ENGINE, REGISTRY, TAG, BASE, VARIANT: docs/guides/containers.md
	@docker/images.sh build
push:           ## push them to REGISTRY
	@docker/images.sh push

setup: .venv/requirements.lock
.venv/requirements.lock: requirements.lock .ci/venv
	@.ci/venv

lint: setup     ## check with ruff, mypy, import-linter, deptry, shellcheck and hadolint, and the links in docs/
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy
	@PYTHONPATH=.:operator .venv/bin/lint-imports
	@$(python) -m deptry .
	@$(python) docs/check_links.py
	@.venv/bin/shellcheck .ci/run .ci/venv docker/*.sh
	@.venv/bin/hadolint docker/*.Dockerfile devcluster/kind_node/Dockerfile

manifests: setup  ## write manifests/crd.yaml and docs/reference/api.md from vpmoe/api
	@$(python) -m vpmoe.api.crd >manifests/crd.yaml
	@$(python) -m vpmoe.api.reference >docs/reference/api.md

# `make lock options=--upgrade` takes the newest versions that pyproject.toml allows. The images have the versions
# that the tests run with. Only vLLM for CUDA, and what it alone needs, is in no other lock.
compile = .venv/bin/uv pip compile --quiet --python-version 3.12 --generate-hashes --no-emit-index-url --no-header $(options)
of_image = $(compile) --constraints requirements.lock pyproject.toml
lock: setup     ## write requirements.lock and docker/*.lock from pyproject.toml
	@$(compile) pyproject.toml $(addprefix --extra ,operator data train inference-cpu kubectl evaluate trackers demo dev) --group tools -o requirements.lock
	@$(of_image) --extra operator -o docker/operator.lock
	@$(of_image) --extra model -o docker/shared.lock
	@$(of_image) --extra train -o docker/trainer.lock
	@$(of_image) --extra train --extra inference-cpu -o docker/inference-cpu.lock
	@$(of_image) --extra train --extra inference-cuda -o docker/inference-cuda.lock
	@$(compile) --constraints requirements.lock --group tools -o docker/tools.lock
