"""A policy version's weights on their way into the engines: brought to this machine's disk, loaded, and proved to be the trainer's student.

One version is on disk at a time. Which version is wanted when is sampler.py's business.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent, Retriable
from vpmoe.inference.engine_pool import CheckStop, Completion, Request
from vpmoe.rollout.policy_version import Probe, Version
from vpmoe.rollout.window_files import LEAST_LOGP
from vpmoe.storage import Bucket
from vpmoe.storage.manifest import Manifest

log = logging.getLogger(__name__)

EXACT = 1e-3
"""Nats by which any token of a probe may differ in float32: other orders of summation give some 1e-5, another student gives more."""
ROUNDED = 0.2
"""Nats by which a probe's tokens may differ on average in bfloat16: vpmoe-6b with logits of spread 3 gives 0.04 and 0.3 at a single token
(benchmarks/agreement.py), another student gives more than 1."""


class InferenceEngines(Protocol):
    """The engines (engines.Engines)."""

    loaded: bool

    def load(self, folder: Path, check_stop: CheckStop) -> None: ...
    def sample(self, requests: Sequence[Request], check_stop: CheckStop) -> list[Completion]: ...
    def score(self, sequences: Sequence[Ids], check_stop: CheckStop) -> list[list[NDArray[np.float32]]]: ...


@dataclass(frozen=True)
class Load:
    """How a version was loaded, for the metrics."""

    seconds: float
    """From its first byte to its proof."""
    probe: float
    """Largest difference from the trainer's log-probabilities of the probe, in nats."""


def load(
    bucket: Bucket,
    published: Manifest,
    facts: Version,
    engines: InferenceEngines,
    scratch: Path,
    check_stop: CheckStop,
) -> Load:
    """Have the engines compute with a version's weights, and prove that they do.

    Raises StorageError where a file is not what the manifest says; Permanent where the files are no student of the run, or where engines
    that were just started compute another student than the trainer; Retriable where engines do that took other weights before: started
    anew they may not.
    """
    started, fresh = time.monotonic(), not engines.loaded
    folder = fetch(bucket, published, scratch, check_stop)
    engines.load(folder, check_stop)
    found = engines.score([np.array(ids, np.int32) for ids in facts.probe.ids], check_stop)
    exact = json.loads((folder / "config.json").read_bytes())["dtype"] == "float32"
    worst = max(
        verify_against_probe(facts.probe, logp, exact, fresh, f"{bucket.url(published.key)}: engine {n}")
        for n, logp in enumerate(found)
    )
    done = Load(time.monotonic() - started, worst)
    log.info(
        "Version %d loaded and proved in %.1f s: at most %.2g nats from the trainer",
        facts.version,
        done.seconds,
        worst,
    )
    return done


def fetch(bucket: Bucket, published: Manifest, scratch: Path, check_stop: CheckStop) -> Path:
    """Bring a version's files below `scratch`, every block proved, in the place of any other's; returns their folder."""
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
    """The largest difference between the trainer's log-probabilities and those found, in nats.

    `exact`: whether the weights are float32; `fresh`: whether nothing was loaded before. Raises as `load` does, with the worst token.
    """
    wanted = np.concatenate([np.array(of_sequence, np.float64) for of_sequence in probe.logp])
    found = np.maximum(np.concatenate(logp), LEAST_LOGP)  # as the trainer writes them
    off = np.abs(found - wanted)
    measured, bound, how = (
        (float(off.max()), EXACT, "at most") if exact else (float(off.mean()), ROUNDED, "on average")
    )
    if measured <= bound:  # and not where it is no number
        return float(off.max())
    place = int(off.argmax())
    ids = [token for sequence in probe.ids for token in sequence[1:]]
    said = (
        f"{where} computes another student than the trainer that published it: the log-probabilities of the probe differ by {measured:.3g} "
        f"nats {how}, and {bound:g} is allowed; most of all that of token {ids[place]}, {found[place]:.4f} here and "
        f"{wanted[place]:.4f} there. "
    )
    if not fresh:
        raise Retriable(f"{said}Another attempt loads it into new engines.")
    raise Permanent(
        f"{said}Either its files are not what the trainer computed with, or vLLM computes it wrongly on this machine. Delete the version's "
        "folder and have the trainer resume from a checkpoint before it; if that does not help, use another image."
    )
