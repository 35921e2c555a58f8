"""Seconds from a trainer's optimizer step until engines can sample from the new policy version.

    python -m benchmarks.publication [--versions 3] [--disk 1.2] [--pcie 25] [--probe 0.3] [--bucket 0.25,1,3]

Two tables: the tiny student, measured on the CPU, and vpmoe-6b in bf16, calculated.

Measured: the trainer's publication to an S3 store on loopback (copy and probe, for which training waits; then
export, upload and manifest, during training) and the sampler's load (download, into an engine, verification),
with vLLM on the CPU. Version 0 also starts the engine, so it is excluded from the median. Floor: writing the
same bytes to this disk, putting them into the store and fetching them, each as one file.

Calculated: the phases in the order of the code, at the given rates: copy over PCIe, write to disk, read and
upload, fetch and write to the sampler's disk, read into its GPUs. With vpmoe-6b on a machine with an H100,
the copy of 11.2 GiB into pinned memory took 0.24 s and the export 10.1 s. --disk defaults to the rate of that
export, --pcie to half the rate of that copy. Floor: every byte crosses the bucket's link twice.
"""

import argparse
import os
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.preprocess import store
from vpmoe.api import DistillRun
from vpmoe.api.stages import OnPolicy
from vpmoe.checkpoint.train_state import TrainState, WindowStream
from vpmoe.inference import verify
from vpmoe.inference.engine_pool import EnginePool
from vpmoe.model import device as devices
from vpmoe.model import distributed
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES
from vpmoe.provenance import Provenance
from vpmoe.rollout import policy_version
from vpmoe.storage import Bucket
from vpmoe.storage.manifest import Input
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.onpolicy.publisher import PROBE_DOCUMENTS, PROBE_TOKENS, Publisher

SHAPE = "tiny"
LONGEST = 256
"""Sequence length of the learner and the engine."""
COLUMNS = ("training waits", "export, upload", "fetch", "load, verify", "total")


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run_of(endpoint: str) -> DistillRun:
    """A run with one OnPolicy stage whose storage is the store."""
    return DistillRun.parse(
        {
            "apiVersion": "vpmoe.dev/v1alpha1",
            "kind": "DistillRun",
            "metadata": {"name": "benchmark"},
            "spec": {
                "dataset": {"source": "s3://none/none"},
                "teacher": {"model": "s3://none/none"},
                "student": {"shape": SHAPE, "gpus": 2},
                "stages": [{"name": "onpolicy", "kind": "OnPolicy", "require": {"validity": 0}}],
                "storage": {
                    "endpoint": endpoint,
                    "bucket": "benchmark",
                    "prefix": secrets.token_hex(8),
                    "credentialsSecret": None,
                },
            },
        }
    )


def measure(endpoint: str, versions: int, scratch: Path) -> tuple[list[tuple[float, ...]], int]:
    """The seconds of COLUMNS for each version, and the bytes of one version."""
    run, device = run_of(endpoint), devices.choose()
    distributed.start(device)
    (stage,) = run.spec.stages
    assert isinstance(stage, OnPolicy)
    provenance = Provenance(
        None, None, run.config_hash, "default", "benchmark", run.uid8, stage.name, 1, "2026-01-01T00:00:00Z"
    )
    bucket = Bucket.open(run.spec.storage)
    no_dataset: Any = None  # publication does not use it
    task = StageContext(run, stage, bucket, no_dataset, provenance, threading.Event(), scratch / "trainer")
    learner = Learner.build(
        SHAPES[SHAPE], device, sequence_length=LONGEST, seed=1, weight_decay=0.1, gradient_clip=1.0
    )
    probed = [
        np.random.default_rng(n).integers(0, SHAPES[SHAPE].vocabulary, PROBE_TOKENS, np.int32)
        for n in range(PROBE_DOCUMENTS)
    ]
    inputs = [Input(name, "s3://none/none", {"sha256": "0" * 64}, {}) for name in ("tokenizer", "dataset")]
    publisher = Publisher(task, inputs, probed)
    found = []
    with EnginePool(1, SHAPE, LONGEST) as engines:
        for number in range(versions + 1):
            with torch.no_grad():
                learner.student.output.add_(0.01)  # in place of an optimizer step
            position = TrainState(
                stage=stage.name,
                steps=number,
                tokens=number,
                iteration=number,
                first_sequence=0,
                next_sequence=0,
                epoch=0,
                windows=WindowStream(first_prompt=0, next_prompt=number, trained=number),
            )
            begun = time.perf_counter()
            publisher.publish(learner, position)
            copied = time.perf_counter()
            publisher.wait()
            published = time.perf_counter()
            of = policy_version.find_version(bucket, run, stage.name, number)
            assert of is not None
            loaded = verify.load_version(bucket, *of, engines, scratch / "sampler", lambda: None)
            ended = time.perf_counter()
            fetched = timed(
                lambda of=of: verify.fetch_weights(bucket, of[0], scratch / "again", lambda: None)
            )
            found.append(
                (copied - begun, published - copied, fetched, ended - published - fetched, ended - begun)
            )
            print(
                row(f"version {number}{'' if number else ', new engine'}", found[-1])
                + f"  probe {loaded.probe:.1e} nats",
                flush=True,
            )
            size = sum(subject.size for subject in of[0].subjects.values())
        floor(bucket, size, scratch)
    publisher.close()
    distributed.stop()
    return found, size


def floor(bucket: Bucket, size: int, scratch: Path) -> None:
    """Print the times to write `size` bytes to disk, put them into the store and fetch them, as one file."""
    file = scratch / "floor"
    data = np.random.default_rng(0).bytes(size)
    written = timed(lambda: file.write_bytes(data))
    start = time.perf_counter()
    stored = bucket.put_file("floor", file, {})
    put = time.perf_counter() - start
    fetched = timed(lambda: bucket.download(stored, scratch / "back"))
    print(row("floor, one file", (0.0, written + put, fetched, 0.0, written + put + fetched)))


def row(name: str, seconds: tuple[float, ...]) -> str:
    """A line of a table."""
    return f"{name:>22}  " + "  ".join(f"{each:14.2f}" for each in seconds)


def at_size(size: int, bucket: float, disk: float, pcie: float, probe: float) -> tuple[float, ...]:
    """The seconds of COLUMNS for `size` bytes; `bucket`, `disk` and `pcie` in GB/s, `probe` in seconds.

    The phases follow each other, except that an upload reads from the disk while it sends.
    """
    bytes_, waits = size / 1e9, probe
    through = bytes_ / min(bucket, disk)
    parts = (waits + bytes_ / pcie, bytes_ / disk + through, through, bytes_ / min(disk, pcie) + probe)
    return (*parts, sum(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", type=int, default=3, help="versions to measure after version 0")
    parser.add_argument(
        "--disk", type=float, default=1.2, help="GB/s to read or write a pod's disk (default: 1.2)"
    )
    parser.add_argument(
        "--pcie",
        type=float,
        default=25.0,
        help="GB/s between GPU and host (default: 25; pinned memory reaches 50)",
    )
    parser.add_argument(
        "--probe", type=float, default=0.3, help="seconds of a forward pass over the probe (assumed: 0.3)"
    )
    parser.add_argument(
        "--bucket",
        type=lambda text: [float(rate) for rate in text.split(",")],
        default=[0.25, 1.0, 3.0],
        help="GB/s to and from the bucket, comma-separated (default: 0.25,1,3)",
    )
    given = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    head = f"{'':>22}  " + "  ".join(f"{name:>14}" for name in COLUMNS)
    with store() as (endpoint, _, _), tempfile.TemporaryDirectory() as folder:
        for name in ("trainer", "sampler", "again"):
            (Path(folder) / name).mkdir()
        print(f"Measured, {SHAPE}, seconds:\n{head}")
        found, size = measure(endpoint, given.versions, Path(folder))
        print(
            row(
                "median of reloads",
                tuple(statistics.median(each) for each in zip(*found[1:], strict=True)),
            )
        )
        print(f"{size / 1e6:.1f} MB per version")
    size = 2 * SHAPES["vpmoe-6b"].parameters()
    print(
        f"\nCalculated, vpmoe-6b, {size / 1e9:.1f} GB, disk {given.disk:g} GB/s, PCIe {given.pcie:g} GB/s, "
        f"seconds:\n{head}"
    )
    for rate in given.bucket:
        print(row(f"bucket at {rate:g} GB/s", at_size(size, rate, given.disk, given.pcie, given.probe)))
        print(row("floor", (0.0, size / 1e9 / rate, size / 1e9 / rate, 0.0, 2 * size / 1e9 / rate)))


if __name__ == "__main__":
    main()
