"""Policy versions: the student's weights after a number of windows, as the trainer publishes and the sampler
loads them.

weights/<stage>/v000012/ holds a Hugging Face checkpoint (vpmoe.model.hf_export) and manifest.json, whose
facts are a PolicyVersion.
"""

import hashlib

from pydantic import ConfigDict

from vpmoe.api import DistillRun
from vpmoe.api.base import Record
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.records import facts_of

KIND = "weights"
"""Kind of a version's manifest."""


class Probe(Record):
    """A few sequences with the trainer's log-probabilities of their tokens.

    An engine that loads the weights must reproduce them.
    """

    model_config = ConfigDict(extra="forbid")

    ids: tuple[tuple[int, ...], ...]
    logp: tuple[tuple[float, ...], ...]
    """By sequence: the log-probability of each id but the first, given those before it."""


class PolicyVersion(Record):
    """The facts of a version's manifest."""

    model_config = ConfigDict(extra="forbid")

    version: int
    """Windows trained."""
    steps: int
    """Optimizer steps of the stage so far, anchor steps included: Curriculum.steps_trained."""
    tokens: int
    """Tokens of the stage after these steps. They decide the phase of the windows sampled from this
    version."""
    iteration: int
    """Optimizer steps over all stages."""
    first_sequence: int
    """Sequence of the training stream with which the stage's anchor steps begin."""
    first_prompt: int
    """Prompts used by earlier stages."""
    probe: Probe


def find_version(
    bucket: Bucket, run: DistillRun, stage: str, version: int
) -> tuple[Manifest, PolicyVersion] | None:
    """A published version, None if it is not published yet.

    Raises StorageError if its manifest was altered.
    """
    key = paths.manifest(paths.weights(run, stage, version))
    if not bucket.exists(key):
        return None
    found = manifest.load(bucket, key)
    return found, facts_of(bucket, found, KIND, PolicyVersion)


def weights_digest(published: Manifest) -> str:
    """sha256 (hex) of a version's files: of their sorted (name, sha256).

    Independent of when it was published, and by which attempt.
    """
    return hashlib.sha256(
        json_bytes(sorted([name, subject.sha256] for name, subject in published.subjects.items()))
    ).hexdigest()
