"""Seconds from a trainer's optimizer step until engines can sample from the new policy version.

    python -m benchmarks.publication --shape vpmoe-6b [--versions 3] [--folder /dev/shm]
    python -m benchmarks.publication [--versions 3] [--disk 1.2] [--pcie 25] [--probe 0.3] [--bucket 0.25,1,3]

With --shape: by a volume (runtime.weightsVolume), on this machine's GPU if it has one; no store is needed.
The parts of a version in their order, with the code of trainer and sampler, beside floors measured in the
same run:
  copy       the weights into pinned memory     a plain copy off the GPU into pinned memory
  probe      the trainer's log-probabilities    none
  write      safetensors files into --folder    copying as many bytes into new memory
  hash       sha256 of files and their blocks   sha256 of all bytes twice on all cores, or, if that takes
                                                longer, of the largest file on one
  verify     sha256 of blocks by the sampler    sha256 of all bytes once on all cores, or, if that takes
                                                longer, reading them from the page cache
  load       into all running vLLM engines      a plain copy from pinned memory to the GPU for each
  probe      the engines' log-probabilities     none
Training waits for the first two. The sampler looks for a version ten times a second, which is not counted. A
student without an optimizer makes all versions, each with another output matrix, and is freed; then the
engine starts with version 0, and the others replace it. --folder holds all of them: (versions + 1) × 12 GB
for vpmoe-6b.

Without --shape: by the bucket. Two tables: the tiny student, measured on the CPU, and vpmoe-6b in bf16,
calculated.

Measured: the trainer's publication to an S3 store on loopback (copy and probe, for which training waits; then
export, upload and manifest, during training) and the sampler's load (download, into an engine, verification),
with vLLM on the CPU. Version 0 also starts the engine, so it is excluded from the median. Floor: writing the
same bytes to this disk, putting them into the store and fetching them, each as one file.

Calculated: the phases in the order of the code, at the given rates: copy over PCIe, write to disk, read and
upload, fetch and write to the sampler's disk, read into its GPUs. --disk defaults to the rate of an export
by one thread on a machine with an H100, --pcie to half the rate of its copy into pinned memory. Floor: every
byte crosses the bucket's link twice.
"""

import argparse
import gc
import hashlib
import os
import secrets
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.preprocess import store
from vpmoe.api import DistillRun
from vpmoe.api.stages import OnPolicy
from vpmoe.checkpoint.train_state import TrainState, WindowStream
from vpmoe.inference import verify
from vpmoe.inference.engine_pool import EnginePool
from vpmoe.inference.request_queue import engines_per_gpu
from vpmoe.model import device as devices
from vpmoe.model import distributed, hf_export, state
from vpmoe.model.batch import Batch
from vpmoe.model.head import target_logp
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.model.student import Student, build
from vpmoe.provenance import Provenance
from vpmoe.rollout import policy_version
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.rollout.version_volume import VersionVolume
from vpmoe.storage import BLOCK, Bucket, manifest, paths
from vpmoe.storage.blocks import hash_files
from vpmoe.storage.manifest import Input
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.onpolicy.publisher import PROBE_DOCUMENTS, PROBE_TOKENS, THREADS, Publisher, compute_probe

SHAPE = "tiny"
LONGEST = 256
"""Sequence length of the learner and the engine."""
COLUMNS = ("training waits", "export, upload", "fetch", "load, verify", "total")


PARTS = ("copy", "probe", "write", "hash", "verify", "load", "probe")
"""Parts of a publication by the volume, in their order; training waits for the first two."""
INPUTS = [Input(name, "s3://none/none", {"sha256": "0" * 64}, {}) for name in ("tokenizer", "dataset")]


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run_of(endpoint: str, shape: str = SHAPE) -> DistillRun:
    """A run with one OnPolicy stage whose storage is the store."""
    return DistillRun.parse(
        {
            "apiVersion": "vpmoe.dev/v1alpha1",
            "kind": "DistillRun",
            "metadata": {"name": "benchmark"},
            "spec": {
                "dataset": {"source": "s3://none/none"},
                "teacher": {"model": "s3://none/none"},
                "student": {"shape": shape, "gpus": 2},
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


def provenance_of(run: DistillRun) -> Provenance:
    """Of a trainer's first attempt."""
    return Provenance(
        *(None, None, run.config_hash, "default", "benchmark", run.uid8, run.spec.stages[0].name, 1),
        "2026-01-01T00:00:00Z",
    )


def random_probe(shape: Shape) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Sequences of a probe's number and length."""
    return [
        np.random.default_rng(n).integers(0, shape.vocabulary, PROBE_TOKENS, np.int32)
        for n in range(PROBE_DOCUMENTS)
    ]


def measure(endpoint: str, versions: int, scratch: Path) -> tuple[list[tuple[float, ...]], int]:
    """The seconds of COLUMNS for each version, and the bytes of one version."""
    run, device = run_of(endpoint), devices.choose()
    distributed.start(device)
    (stage,) = run.spec.stages
    assert isinstance(stage, OnPolicy)
    provenance = provenance_of(run)
    bucket = Bucket.open(run.spec.storage)
    no_dataset: Any = None  # publication does not use it
    task = StageContext(run, stage, bucket, no_dataset, provenance, threading.Event(), scratch / "trainer")
    learner = Learner.build(
        SHAPES[SHAPE], device, sequence_length=LONGEST, seed=1, weight_decay=0.1, gradient_clip=1.0
    )
    publisher = Publisher(task, INPUTS, random_probe(SHAPES[SHAPE]))
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


@dataclass
class HeldStudent:
    """A student as a Learner holds it, without the optimizer: with it vpmoe-6b would fill the GPU."""

    student: Student
    device: torch.device

    @torch.no_grad()
    def logp(self, batch: Batch) -> Tensor:
        """Learner.logp."""
        here = batch.to(self.device)
        return target_logp(self.student(here), self.student.output, here.target).cpu()


class Measured(NamedTuple):
    """A version on the volume, and the seconds that the trainer took for its parts."""

    published: manifest.Manifest
    facts: PolicyVersion
    seconds: list[float]


def measure_volume(name: str, versions: int, above: Path) -> None:
    """Print the table of a shape's publication by a volume in the folder `above`."""
    needed = (versions + 1) * hf_export.weight_bytes(SHAPES[name], torch.bfloat16)
    if (free := shutil.disk_usage(above).free) < needed:
        raise SystemExit(f"--folder {above}: {free} bytes are free, and {needed} are needed. Name another.")
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run, device = run_of("http://none", name), devices.choose()
    print(
        f"{name} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}, "
        f"{len(os.sched_getaffinity(0))} cores, {THREADS} threads, {above}"
    )
    with tempfile.TemporaryDirectory(dir=above) as folder:
        volume = VersionVolume(Path(folder), run, run.spec.stages[0].name)
        distributed.start(device)
        made, pinned = write_versions(run, volume, versions, device)
        distributed.stop()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        files = sorted(volume.folder(versions).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"{size / 2**30:.2f} GiB in {len(files)} files a version", flush=True)
        floors = volume_floors(files, size, pinned, device)
        found = [*load_versions(name, volume, made, Path(folder))]
    medians = [statistics.median(each) for each in zip(*found[1:], strict=True)]
    print(f"{'':>22}  " + "  ".join(f"{part:>7}" for part in (*PARTS, "total")))
    for number, each in enumerate(found):
        print(volume_row(f"version {number}" if number else "0, new engine, memory", each))
    print(volume_row("median of the others", medians))
    print(volume_row("floor", floors))
    print(f"training waits {sum(medians[:2]):.2f} s; from the step to sampling {sum(medians):.2f} s")


def write_versions(
    run: DistillRun, volume: VersionVolume, versions: int, device: torch.device
) -> tuple[list[Measured], float]:
    """Write versions 0 to `versions` as Publisher does; returns them, and `copy_rate`."""
    shape, stage = SHAPES[run.spec.student.shape], run.spec.stages[0].name
    student = build(shape, device, sequence_length=LONGEST, seed=1).eval()
    held: Any = HeldStudent(student, device)
    copy: dict[str, Tensor] = {}
    probed, made = random_probe(shape), []
    dtype = student.output.dtype
    for number in range(versions + 1):
        with torch.no_grad():  # in place of an optimizer step; logits spread by 3
            generator = torch.Generator(device).manual_seed(number)
            student.output.normal_(std=3 * shape.hidden**-0.5, generator=generator)
        times = [now_on(device)]
        read = state.copy_weights(held, copy)
        times.append(now_on(device))
        facts = PolicyVersion(
            version=number,
            steps=number,
            tokens=number,
            iteration=number,
            first_sequence=0,
            first_prompt=0,
            probe=compute_probe(held, probed),
        )
        times.append(now_on(device))
        with volume.new_version() as folder:
            hf_export.export_student(folder, shape, LONGEST, state.sizes(held), read, dtype, THREADS)
            times.append(time.perf_counter())
            key = paths.weights(run, stage, number)
            files = {f"{key}/{file.name}": file for file in sorted(folder.iterdir())}
            subjects = [stored.subject(key) for stored in hash_files(files, THREADS)]
            statement = manifest.statement(
                policy_version.KIND, subjects, facts.dump(), provenance_of(run), INPUTS
            )
            volume.add(folder, number, statement)
            times.append(time.perf_counter())
        found = volume.find(number)
        assert found is not None
        made.append(Measured(*found, [stop - start for start, stop in pairwise(times)]))
        print(f"version {number} written", flush=True)
    return made, copy_rate(device)


def now_on(device: torch.device) -> float:
    """The time when all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def copy_rate(device: torch.device) -> float:
    """Seconds per byte of a plain copy between pinned memory and the GPU; 0 on the CPU."""
    if device.type == "cpu":
        return 0.0
    size = 1 << 30
    on_gpu = torch.empty(size, dtype=torch.uint8, device=device)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    best = float("inf")
    for _ in range(3):
        start = now_on(device)
        pinned.copy_(on_gpu, non_blocking=True)
        best = min(best, now_on(device) - start)
    return best / size


def load_versions(
    name: str, volume: VersionVolume, made: Iterable[Measured], scratch: Path
) -> Iterable[list[float]]:
    """Load the versions into the engines of a GPU as the sampler does; yields the seconds of PARTS for
    each."""
    with EnginePool(1, name, LONGEST, per_gpu=engines_per_gpu(os.environ)) as engines:
        for published, facts, seconds in made:
            exact, fresh = torch.cuda.is_available() is False, not engines.loaded
            times = [time.perf_counter()]
            with volume.reading(published, lambda: None) as folder:
                assert folder is not None
                times.append(time.perf_counter())
                engines.load(folder)
            times.append(time.perf_counter())
            found = engines.score([np.array(ids, np.int32) for ids in facts.probe.ids])
            where = f"version {facts.version}"
            worst = max(
                verify.verify_against_probe(facts.probe, scores, exact, fresh, where) for scores in found
            )
            times.append(time.perf_counter())
            print(f"{where} loaded by {len(found)} engines, probe at most {worst:.2g} nats", flush=True)
            yield [*seconds, *(stop - start for start, stop in pairwise(times))]


def volume_floors(files: list[Path], size: int, per_byte: float, device: torch.device) -> list[float]:
    """The seconds of each of PARTS that its floor takes."""
    cores = min(THREADS, len(os.sched_getaffinity(0)))
    block = np.random.default_rng(0).bytes(BLOCK)
    hashed = min(timed(lambda: hashlib.sha256(block).digest()) for _ in range(5)) / BLOCK
    largest = max(file.stat().st_size for file in files)
    with ThreadPoolExecutor(THREADS) as pool:
        share = np.frombuffer(block, np.uint8)
        blocks = range(-(-size // BLOCK))
        copied = timed(lambda: list(pool.map(lambda _: share.copy(), blocks)))
        ranges = [(file, start) for file in files for start in range(0, file.stat().st_size, BLOCK)]
        read = timed(lambda: list(pool.map(lambda one: read_block(*one), ranges)))
    return [
        size * per_byte,
        0.0,
        copied,
        max(2 * size * hashed / cores, largest * hashed),
        max(size * hashed / cores, read),
        size * per_byte,
        0.0,
    ]


def read_block(file: Path, start: int) -> None:
    """Read a block of a file, and drop it."""
    with file.open("rb", buffering=0) as opened:
        os.pread(opened.fileno(), BLOCK, start)


def volume_row(name: str, seconds: Iterable[float]) -> str:
    """A line of the volume's table, with the sum."""
    seconds = list(seconds)
    return f"{name:>22}  " + "  ".join(f"{each:7.2f}" for each in (*seconds, sum(seconds)))


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
    parser.add_argument("--shape", choices=SHAPES, help="measure the publication of this shape by a volume")
    parser.add_argument(
        "--folder", type=Path, default=Path("/dev/shm"), help="the volume, with --shape (default: /dev/shm)"
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
    if given.shape:
        measure_volume(given.shape, given.versions, given.folder)
        return
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
