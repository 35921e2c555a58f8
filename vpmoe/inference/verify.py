"""Load a policy version into the engines: download it, or find it on a volume, load it, and verify that it
computes what the trainer computed.

One downloaded version is on disk at a time. The sampler decides which version it needs and when.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent, Retriable
from vpmoe.inference.engine_pool import CheckStop, Completion, SamplingRequest
from vpmoe.rollout.policy_version import PolicyVersion, Probe
from vpmoe.rollout.version_volume import VersionVolume
from vpmoe.rollout.window_files import MIN_LOGP
from vpmoe.storage import Bucket
from vpmoe.storage.manifest import Manifest

log = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-3
"""Largest difference at any token of a probe in float32, in nats. Another order of summation gives about
1e-5; another student gives more."""
BFLOAT16_TOLERANCE = 0.2
"""Largest mean difference over a probe's tokens in bfloat16, in nats. vpmoe-6b with logits of standard
deviation 3 gives a mean of 0.04 and 0.3 at a single token (benchmarks/agreement.py); another student gives
more than 1."""


Source = Literal["bucket", "volume"]
"""Where a version's weights are read."""


class InferenceEngines(Protocol):
    """What callers need of engine_pool.EnginePool."""

    loaded: bool

    def load(self, folder: Path, check_stop: CheckStop) -> None: ...
    def sample(self, requests: Sequence[SamplingRequest], check_stop: CheckStop) -> list[Completion]: ...
    def score(self, sequences: Sequence[Ids], check_stop: CheckStop) -> list[list[NDArray[np.float32]]]: ...


class SamplingEngines(InferenceEngines, Protocol):
    """What the sampler needs of engine_pool.EnginePool."""

    depth: int | None

    def sample_queue(
        self, requests: Sequence[SamplingRequest], check_stop: CheckStop
    ) -> Iterator[tuple[int, Completion]]: ...
    def check_engines(self, check_stop: CheckStop) -> None: ...


@dataclass(frozen=True)
class LoadStats:
    """How loading a version went; part of the sampler's metrics."""

    seconds: float
    """From the start of the download, or of reading the volume, until the version was verified."""
    probe: float
    """Largest difference from the trainer's log-probabilities of the probe, in nats."""
    source: Source


def load_version(
    bucket: Bucket,
    published: Manifest,
    version: PolicyVersion,
    engines: InferenceEngines,
    scratch: Path,
    check_stop: CheckStop,
    volume: VersionVolume | None = None,
) -> LoadStats | None:
    """Load a version's weights into the engines and verify them against its probe.

    `volume`: the volume that `published` was found on; None if that was the bucket. Returns None if the
    volume has not the version any more, as `published` says: find it again.

    Raises StorageError if a file is not what the manifest says, Permanent if the files are not a student of
    the run or if newly started engines compute another student, and Retriable if engines that held other
    weights before do: new engines may compute it correctly.
    """
    started, fresh = time.monotonic(), not engines.loaded
    with weights_folder(bucket, published, scratch, check_stop, volume) as folder:
        if folder is None:
            return None
        read = time.monotonic()
        engines.load(folder, check_stop)
        exact = json.loads((folder / "config.json").read_bytes())["dtype"] == "float32"
    loaded = time.monotonic()
    scores = engines.score([np.array(ids, np.int32) for ids in version.probe.ids], check_stop)
    worst = max(
        verify_against_probe(version.probe, logp, exact, fresh, f"{bucket.url(published.key)}: engine {n}")
        for n, logp in enumerate(scores)
    )
    stats = LoadStats(time.monotonic() - started, worst, "volume" if volume else "bucket")
    log.info(
        "Loaded and verified version %d from the %s in %.1f s (files %.1f, engines %.1f): at most %.2g nats "
        "from the trainer's log-probabilities",
        version.version,
        stats.source,
        stats.seconds,
        read - started,
        loaded - read,
        worst,
    )
    return stats


@contextmanager
def weights_folder(
    bucket: Bucket,
    published: Manifest,
    scratch: Path,
    check_stop: CheckStop,
    volume: VersionVolume | None,
) -> Iterator[Path | None]:
    """A folder with a version's files, each block verified: on the volume it was found on, or downloaded.

    None if it is not on that volume any more.
    """
    if volume is None:
        yield fetch_weights(bucket, published, scratch, check_stop)
    else:
        with volume.reading(published, check_stop) as folder:
            yield folder


def fetch_weights(bucket: Bucket, published: Manifest, scratch: Path, check_stop: CheckStop) -> Path:
    """Download a version's files below `scratch`, in place of an earlier version; returns their folder.

    Every block is verified. Raises StorageError if one is not what the manifest says.
    """
    folder = scratch / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, subject in published.subjects.items():
        check_stop()
        bucket.download(subject, folder / name)
    return folder


def verify_against_probe(
    probe: Probe, logp: Sequence[NDArray[np.float32]], exact: bool, fresh: bool, where: str
) -> float:
    """The largest difference between the trainer's log-probabilities of the probe and `logp`, in nats.

    `exact`: the weights are float32. `fresh`: the engine held no other weights before. Raises Permanent, or
    Retriable if not `fresh`, with the worst token if the difference is larger than the tolerance.
    """
    wanted = np.concatenate([np.array(of_sequence, np.float64) for of_sequence in probe.logp])
    found = np.maximum(np.concatenate(logp), MIN_LOGP)  # the trainer clamps the probe's too
    difference = np.abs(found - wanted)
    measured, tolerance, how = (
        (float(difference.max()), FLOAT32_TOLERANCE, "at most")
        if exact
        else (float(difference.mean()), BFLOAT16_TOLERANCE, "on average")
    )
    if measured <= tolerance:  # False for NaN
        return float(difference.max())
    worst = int(difference.argmax())
    ids = [token for sequence in probe.ids for token in sequence[1:]]
    message = (
        f"{where} computes another student than the trainer that published it: the log-probabilities of the "
        f"probe differ by {measured:.3g} nats {how}, and {tolerance:g} is allowed; most of all that of "
        f"token {ids[worst]}, which is {found[worst]:.4f} here and {wanted[worst]:.4f} in the trainer. "
    )
    if not fresh:
        raise Retriable(f"{message}Another attempt loads it into new engines.")
    raise Permanent(
        f"{message}Either the version's files are not what the trainer computed with, or vLLM computes it "
        "incorrectly on this machine. Delete the version's folder and have the trainer resume from an "
        "earlier checkpoint; if that does not help, use another image."
    )
