"""A Vanilla stage of a small student, with no part and with every part, ends at the recorded weights.

Bits of floats depend on the CPU's instruction set, so the hash is compared only on the recorded one. On
others, losses may differ by 2e-5 relative and sums of a tensor by 2e-6 of its sum of absolute values: ten
times the measured difference of an AVX2 and a scalar build of PyTorch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, students, trainers
from tests.fakes.recorded import BUCKET, VALUES, plain, sha256, small_run
from tests.fakes.reporters import RecordingReporter
from tests.fakes.store import S3
from vpmoe.api import DistillRun
from vpmoe.checkpoint.train_state import list_iterations
from vpmoe.model.shapes import Shape
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.trainer.data import collate


def same_cpu(vendor: str) -> bool:
    """Whether the bits of floats can be those that were recorded on a CPU of this vendor: libraries choose
    kernels by vendor too."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == VALUES["environment"]["cpu"] and vendor in Path("/proc/cpuinfo").read_text()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def spec(s3: S3) -> dict[str, Any]:
    (s3.folder / BUCKET).mkdir(exist_ok=True)
    spec = small_run(stages=[{"name": "vanilla", "kind": "Vanilla", "tokens": 1500}])
    spec["metadata"]["name"] = "vanilla"
    spec["spec"]["dataset"]["maxLength"] = 64
    spec["spec"]["student"]["gpus"] = 2
    spec["spec"]["training"] |= {
        "sequenceLength": 64,
        "globalBatchTokens": 128,
        "checkpoint": {"everyTokens": 400, "keep": 9},
    }
    spec["spec"]["evaluation"] |= {"everyTokens": 800}
    return spec


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "shape, rounded, exact, vendor",
    [
        pytest.param(
            students.SMALL,
            VALUES["vanilla"]["rounded"],
            VALUES["vanilla"]["exact"],
            "GenuineIntel",
            id="no part",
        ),
        pytest.param(
            students.COMPLETE,
            VALUES["vanilla"]["everyPart"]["rounded"],
            VALUES["vanilla"]["everyPart"]["exact"],
            "AuthenticAMD",
            id="every part",
        ),
    ],
)
def test_a_vanilla_stage_ends_at_the_recorded_weights(
    shape: Shape,
    rounded: dict[str, Any],
    exact: dict[str, Any],
    vendor: str,
    spec: dict[str, Any],
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collate, "PADDING", 0)  # the small vocabulary has no other
    run = DistillRun.parse(spec)
    bucket = Bucket.open(run.spec.storage)
    bucket.delete_prefix(paths.run(run))  # of the other student
    random = np.random.default_rng(11)
    train = [datasets.random_documents(random, 60), datasets.random_documents(random, 40)]
    valid = [datasets.random_documents(np.random.default_rng(5), 9)]
    context = datasets.context(bucket, spec, tmp_path, datasets.write_dataset(bucket, train, valid))
    learner, reporter = students.learner(device, shape), RecordingReporter()
    trainers.trainer(context, device, learner, reporter, held_out=9).run()
    steps = [line for line in map(plain, reporter.lines) if line["event"] == "step"]
    portable = VALUES["vanilla"]["portable"]
    folder = paths.checkpoints(context.run, "vanilla")
    iterations = sorted(list_iterations(bucket, folder))
    last = manifest.load(bucket, paths.manifest(f"{folder}/{iterations[-1]}"))
    assert iterations == portable["checkpoints"] and sorted(last.subjects) == portable["files"]
    assert [line["tokens"] for line in steps] == portable["tokens"]
    assert [line["kind"] for line in steps] == portable["kinds"]
    assert [f"{line['learningRate']:.6g}" for line in steps] == portable["rates"]
    assert [line["loss"] for line in steps] == pytest.approx(list(map(float, rounded["loss"])), rel=2e-5)
    norms = list(map(float, rounded["gradientNorm"]))
    assert [line["gradientNorm"] for line in steps] == pytest.approx(norms, rel=2e-5)
    state = students.copy_slices(learner)
    for name, (total, size, *_) in rounded["state"].items():
        values = torch.cat([numbers.flatten().double() for _, numbers in state[name]])
        assert float(values.sum()) == pytest.approx(float(total), abs=2e-6 * float(size) + 1e-6), name
    if same_cpu(vendor):
        hashes = {
            key: [[start, sha256(numbers.contiguous().numpy().tobytes())] for start, numbers in slices]
            for key, slices in sorted(state.items())
        }
        assert sha256(hashes) == exact["state"]
        files = {name: subject.sha256 for name, subject in last.subjects.items()}
        assert files == exact["checkpoint"]
