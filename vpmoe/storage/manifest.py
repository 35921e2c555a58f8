"""Manifests: an object without one does not exist. Files are written first, the manifest last and once.

A manifest is an in-toto Statement v1 (https://in-toto.io/Statement/v1) with a SLSA provenance v1 predicate
(https://slsa.dev/provenance/v1): what was written, block by block, and from what. The models here define the
format and reject unknown fields. The writer of each kind defines its facts.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from vpmoe.clock import timestamp
from vpmoe.provenance import Provenance
from vpmoe.storage.blocks import BLOCK, Subject
from vpmoe.storage.bucket import Bucket, json_bytes
from vpmoe.storage.errors import StorageError

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILDER = "https://vpmoe.dev/jobs"
WITHOUT_DATASET = ("dataset", "init")
"""Kinds of manifest whose objects are made from no dataset."""
HARMONY = "harmony"
"""Name of the input that is the Harmony library."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")]
BuildType = Annotated[str, StringConstraints(pattern=r"^https://vpmoe\.dev/[a-z]+/v1$")]
Invocation = Annotated[str, StringConstraints(pattern=r"^[^/]+/[^/]+-[0-9a-f]{8}/[^/]+/[0-9]+$")]


@dataclass(frozen=True)
class Input:
    """An input of a manifest's objects.

    name: its role; "tokenizer" is required, and "dataset" in all but WITHOUT_DATASET; others are
    free (an input shard's key, "checkpoint"). uri: its address. digest: by algorithm, e.g. {"sha256": …} or
    {"gitCommit": …}. facts: what else identifies it, e.g. {"size": …, "etag": …} of an object without a
    digest.
    """

    name: str
    uri: str
    digest: Mapping[str, str]
    facts: Mapping[str, Any]


class Part(BaseModel):
    """A part of the format: names in camel case, no extra field, none missing, no type coercion."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=to_camel, populate_by_name=True
    )


class Sha256Digest(Part):
    """The digest of a whole object."""

    sha256: Sha256


class SubjectFacts(Part):
    """Bytes of an object, and the sha256 of each of its blocks."""

    size: int = Field(ge=0)
    block_size: Literal[8388608]
    blocks: list[Sha256]


class SubjectEntry(Part):
    """An object, by its key relative to the manifest's folder."""

    name: Name
    digest: Sha256Digest
    annotations: SubjectFacts

    @model_validator(mode="after")
    def _as_many_blocks(self) -> Self:
        size, blocks = self.annotations.size, len(self.annotations.blocks)
        if blocks != -(-size // BLOCK):
            raise ValueError(f"{self.name}: {size} bytes have {-(-size // BLOCK)} blocks, not {blocks}")
        return self


class Dependency(Part):
    """An input (SLSA's ResourceDescriptor)."""

    name: str
    uri: str
    digest: dict[str, str]
    annotations: dict[str, Any]


class External(Part):
    """The request: the run and the hash of its configuration."""

    run: str
    config: Sha256
    step: str


class BuildDefinition(Part):
    """What was made, from what, with which parameters."""

    build_type: BuildType
    external_parameters: External
    internal_parameters: dict[str, Any]
    resolved_dependencies: list[Dependency]


class Version(Part):
    """The code that ran; null if a process started by hand does not know it."""

    git_sha: str | None
    image: str | None


class Builder(Part):
    """The builder."""

    id: Literal["https://vpmoe.dev/jobs"]
    version: Version


class Metadata(Part):
    """The process (namespace/name-uid8/step/attempt), and its times (RFC 3339, UTC)."""

    invocation_id: Invocation
    started_on: Time
    finished_on: Time


class RunDetails(Part):
    """The run of the builder."""

    builder: Builder
    metadata: Metadata


class Predicate(Part):
    """SLSA provenance."""

    build_definition: BuildDefinition
    run_details: RunDetails


class Statement(Part):
    """A whole manifest."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[SubjectEntry] = Field(min_length=1)
    predicate_type: Literal["https://slsa.dev/provenance/v1"]
    predicate: Predicate


class Named[T](dict[str, T]):
    """What a manifest names, by name. Asking for what it does not name is an error of the manifest."""

    def __init__(self, key: str, named: Mapping[str, T]) -> None:
        super().__init__(named)
        self._key = key

    def __missing__(self, name: str) -> T:
        raise StorageError(
            f"{self._key}: it does not name {name}. It was altered, or is the manifest of something else. "
            "Restore it, or delete it and what it names to have them built again.",
            "Altered",
        )


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and validated.

    key: its key; sha256: of its own bytes; kind: "dataset", "checkpoint", …; subjects, inputs: by name;
    facts: the writer's facts (SLSA's internalParameters); provenance: of the writer; raw: the whole
    Statement.
    """

    key: str
    sha256: str
    kind: str
    subjects: Mapping[str, Subject]
    facts: Mapping[str, Any]
    inputs: Mapping[str, Input]
    provenance: Provenance
    raw: Mapping[str, Any]


def entry(subject: Subject) -> dict[str, Any]:
    """A subject as a manifest holds it; `subject_of` reads it back."""
    return {
        "name": subject.name,
        "digest": {"sha256": subject.sha256},
        "annotations": {"size": subject.size, "blockSize": BLOCK, "blocks": list(subject.blocks)},
    }


def subject_of(found: Mapping[str, Any], folder: str) -> Subject:
    """The subject of an entry in `folder`'s manifest. Raises ValueError if it is malformed."""
    return _subject(SubjectEntry.model_validate(found), folder)


def _subject(entry: SubjectEntry, folder: str) -> Subject:
    facts = entry.annotations
    return Subject(f"{folder}/{entry.name}", facts.size, entry.digest.sha256, tuple(facts.blocks), entry.name)


def statement(
    kind: str,
    subjects: Iterable[Subject],
    facts: Mapping[str, Any],
    provenance: Provenance,
    inputs: Sequence[Input],
) -> dict[str, Any]:
    """The manifest of objects that are already written.

    The writer's Harmony library is the input HARMONY, if it has one.

    Raises ValueError if a required input is missing ("tokenizer"; "dataset", except in WITHOUT_DATASET), and
    for anything that `load` would reject.
    """
    for needed in ("tokenizer",) if kind in WITHOUT_DATASET else ("tokenizer", "dataset"):
        if not any(found.name == needed and found.digest for found in inputs):
            raise ValueError(
                f"a manifest of kind {kind} has to name its {needed} with a digest among its inputs"
            )
    if provenance.harmony is not None:
        inputs = [*inputs, Input(HARMONY, provenance.harmony, {}, {})]
    made = {
        "_type": STATEMENT,
        "subject": [entry(subject) for subject in sorted(subjects, key=lambda subject: subject.name)],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"https://vpmoe.dev/{kind}/v1",
                "externalParameters": {
                    "run": provenance.run,
                    "config": provenance.config,
                    "step": provenance.step,
                },
                "internalParameters": dict(facts),
                "resolvedDependencies": [
                    {
                        "name": found.name,
                        "uri": found.uri,
                        "digest": dict(found.digest),
                        "annotations": dict(found.facts),
                    }
                    for found in inputs
                ],
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER,
                    "version": {"gitSha": provenance.git_sha, "image": provenance.image},
                },
                "metadata": {
                    "invocationId": f"{provenance.run}/{provenance.step}/{provenance.attempt}",
                    "startedOn": provenance.started,
                    "finishedOn": timestamp(),
                },
            },
        },
    }
    parse("", json_bytes(made))
    return made


def write(bucket: Bucket, key: str, made: Mapping[str, Any]) -> Manifest:
    """Write a manifest unless it exists, and return the stored one: the first writer's.

    A writer that replaces objects under an existing manifest deletes that manifest first.
    """
    data = json_bytes(made)
    of = parse(key, data).provenance
    if bucket.create(key, data, of.metadata()):
        return parse(key, data)
    return load(bucket, key)


def load(bucket: Bucket, key: str) -> Manifest:
    """The manifest at `key`. Raises StorageError: Missing if there is none, Altered if it is malformed."""
    try:
        return parse(key, bucket.get(key))
    except ValueError as error:
        raise StorageError(
            f"{bucket.url(key)}: not a vpMoE manifest: {error}. It was altered, or written by another "
            "version. Delete it: the files that it names are then built again.",
            "Altered",
        ) from error


def parse(key: str, data: bytes) -> Manifest:
    """A manifest's content, validated. Raises ValueError that names the invalid fields."""
    try:
        found = Statement.model_validate_json(data)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'content'}: {fault['msg']}" for fault in error.errors()[:5]
        ]
        raise ValueError("; ".join(faults)) from error
    folder = key.rpartition("/")[0]
    subjects = [_subject(entry, folder) for entry in found.subject]
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"subject: {next(name for name in names if names.count(name) > 1)} is named twice")
    build, details = found.predicate.build_definition, found.predicate.run_details
    inputs = {
        found.name: Input(found.name, found.uri, found.digest, found.annotations)
        for found in build.resolved_dependencies
    }
    namespace, run, step, attempt = details.metadata.invocation_id.split("/")
    name, _, uid8 = run.rpartition("-")
    return Manifest(
        key=key,
        sha256=hashlib.sha256(data).hexdigest(),
        kind=build.build_type.split("/")[3],
        subjects=Named(key, {subject.name: subject for subject in subjects}),
        facts=build.internal_parameters,
        inputs=Named(key, inputs),
        provenance=Provenance(
            git_sha=details.builder.version.git_sha,
            image=details.builder.version.image,
            config=build.external_parameters.config,
            namespace=namespace,
            name=name,
            uid8=uid8,
            step=step,
            attempt=int(attempt),
            started=details.metadata.started_on,
            harmony=inputs[HARMONY].uri if HARMONY in inputs else None,
        ),
        raw=found.model_dump(by_alias=True),
    )
