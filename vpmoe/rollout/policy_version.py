"""A policy version: the student's weights after so many windows, as the trainer publishes them and the sampler takes them.

weights/<stage>/v000012/ holds a Hugging Face checkpoint (weights.py) and manifest.json, whose facts are a Version. Publishing is
vpmoe.training's business, loading the sampler's.
"""

import hashlib

from pydantic import ConfigDict

from vpmoe.api import DistillRun
from vpmoe.api.base import Record
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Manifest

KIND = "weights"


class Probe(Record):
    """A few sequences, and what the trainer finds of each of their tokens with these weights: whoever loads them must find the same."""

    model_config = ConfigDict(extra="forbid")

    ids: tuple[tuple[int, ...], ...]
    logp: tuple[tuple[float, ...], ...]
    """By sequence the log-probability of each id but the first, given those before it."""


class Version(Record):
    """The facts of a version's manifest."""

    model_config = ConfigDict(extra="forbid")

    version: int
    """Windows trained."""
    steps: int
    """Optimizer steps of the stage behind it, anchor steps included: curriculum.published_after."""
    tokens: int
    """Tokens of the stage after these steps; what the windows sampled from it ask for follows from them."""
    iteration: int
    """Optimizer steps over all stages."""
    first_sequence: int
    """Sequence of the training stream that the stage's anchor steps began with."""
    first_prompt: int
    """Prompts that the stages before have used."""
    probe: Probe


def find(bucket: Bucket, run: DistillRun, stage: str, version: int) -> tuple[Manifest, Version] | None:
    """A version that has been published; None where it has not. Raises StorageError where its manifest was altered."""
    key = paths.manifest(paths.weights(run, stage, version))
    if not bucket.exists(key):
        return None
    found = manifest.load(bucket, key)
    return found, Version.model_validate(found.facts)


def content_of(published: Manifest) -> str:
    """sha256 (hex) of a version's content: the sorted (name, sha256) of its files. Whoever published it, and when, has no part in it."""
    return hashlib.sha256(
        json_bytes(sorted([name, subject.sha256] for name, subject in published.subjects.items()))
    ).hexdigest()
