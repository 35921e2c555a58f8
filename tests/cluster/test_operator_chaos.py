"""Runs of the operator on a real API server end as they must, and nothing goes wrong on the way, although its
processes are killed at their writes, its requests fail in every way, watches break, clocks are set, and users
delete what it has made.

The proof is the whole history of the objects (tests/fakes/chaos/invariants.py). One seed again: `-k SEED`.
Other seeds: `python -m tests.fakes.chaos SEED… --folder FOLDER`, with PYTHONPATH=.:operator.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.chaos.__main__ import plane_with_gpus
from tests.fakes.chaos.batch import Batch, run
from tests.fakes.control_plane import ControlPlane

BATCHES = [
    Batch(seed=1001, runs=50, kills=24),
    Batch(seed=1002, runs=50, kills=24),
    Batch(seed=1003, runs=50, kills=24, replicas=2),
    Batch(seed=1004, runs=50, kills=24, replicas=2),
]
"""200 runs. Their number decides how long the test takes."""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with plane_with_gpus(tmp_path_factory.mktemp("control-plane"), BATCHES[0].capacity) as plane:
        yield plane


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"seed-{batch.seed}-replicas-{batch.replicas}")
def test_no_run_is_harmed_by_kills_faults_and_clocks(
    plane: ControlPlane, batch: Batch, tmp_path: Path
) -> None:
    namespace = f"chaos-{batch.seed}"
    plane.create_namespace(namespace)
    outcome = asyncio.run(run(batch, plane.kubeconfig, namespace, tmp_path))
    print(f"seed {batch.seed}: {outcome.requests.total()} requests in {outcome.seconds:.0f} s")
    print(f"killed at {outcome.killed_at}")
    assert not outcome.violations, "\n".join([f"seed {batch.seed}", *outcome.violations, *outcome.timelines])
    writes = {"PUT distillruns/status", "POST jobs", "POST configmaps", "POST events"}
    assert outcome.killed_at.total() > 8 and len(writes & outcome.killed_at.keys()) > 2, outcome.killed_at
