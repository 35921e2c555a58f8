"""The manifest format: an in-toto statement with SLSA provenance. Malformed manifests are rejected with the
field's name."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vpmoe.provenance import Provenance
from vpmoe.storage import BLOCK, Bucket, StorageError, manifest
from vpmoe.storage.blocks import hash_bytes
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Input

HEX = "0123456789abcdef" * 4
PROVENANCE = Provenance(
    "c0ffee" * 6 + "c0ff",
    "vpmoe/trainer:1",
    HEX,
    "team",
    "first-run",
    "0123abcd",
    "vanilla",
    2,
    "2026-01-01T00:00:00Z",
)
TOKENIZER = Input("tokenizer", "o200k_harmony", {"sha256": HEX}, {})
DATASET = Input("dataset", "s3://vpmoe/datasets/x/manifest.json", {"sha256": HEX}, {})
FOLDER = "runs/team/first-run-0123abcd/checkpoints/vanilla/100"
KEY = f"{FOLDER}/manifest.json"
SUBJECTS = [
    hash_bytes(f"{FOLDER}/{name}", data).subject(FOLDER)
    for name, data in (("b/rank-1", bytes(BLOCK + 1)), ("a", b""))
]


def statement(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "kind": "checkpoint",
        "subjects": SUBJECTS,
        "facts": {"tokens": 7},
        "provenance": PROVENANCE,
        "inputs": [TOKENIZER, DATASET],
    }
    return manifest.statement(**{**arguments, **changes})


def test_a_statement_names_objects_inputs_and_origin() -> None:
    found = statement()
    predicate = found["predicate"]
    finished = predicate["runDetails"]["metadata"].pop("finishedOn")
    assert PROVENANCE.started < finished
    assert found == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {
                "name": "a",
                "digest": {"sha256": hashlib.sha256().hexdigest()},
                "annotations": {"size": 0, "blockSize": BLOCK, "blocks": []},
            },
            {
                "name": "b/rank-1",
                "digest": {"sha256": hashlib.sha256(bytes(BLOCK + 1)).hexdigest()},
                "annotations": {
                    "size": BLOCK + 1,
                    "blockSize": BLOCK,
                    "blocks": [hashlib.sha256(bytes(BLOCK)).hexdigest(), hashlib.sha256(b"\0").hexdigest()],
                },
            },
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://vpmoe.dev/checkpoint/v1",
                "externalParameters": {"run": "team/first-run-0123abcd", "config": HEX, "step": "vanilla"},
                "internalParameters": {"tokens": 7},
                "resolvedDependencies": [
                    {
                        "name": "tokenizer",
                        "uri": "o200k_harmony",
                        "digest": {"sha256": HEX},
                        "annotations": {},
                    },
                    {
                        "name": "dataset",
                        "uri": "s3://vpmoe/datasets/x/manifest.json",
                        "digest": {"sha256": HEX},
                        "annotations": {},
                    },
                ],
            },
            "runDetails": {
                "builder": {
                    "id": "https://vpmoe.dev/jobs",
                    "version": {"gitSha": PROVENANCE.git_sha, "image": "vpmoe/trainer:1"},
                },
                "metadata": {
                    "invocationId": "team/first-run-0123abcd/vanilla/2",
                    "startedOn": "2026-01-01T00:00:00Z",
                },
            },
        },
    }


def test_a_manifest_is_loaded_as_it_was_written(bucket: Bucket) -> None:
    written = manifest.write(bucket, KEY, statement())
    found = manifest.load(bucket, KEY)
    assert found == written
    assert found.sha256 == hashlib.sha256(bucket.get(KEY)).hexdigest()
    assert (found.key, found.kind, found.facts, found.provenance) == (
        KEY,
        "checkpoint",
        {"tokens": 7},
        PROVENANCE,
    )
    assert found.inputs == {"tokenizer": TOKENIZER, "dataset": DATASET}
    assert found.subjects == {subject.name: subject for subject in SUBJECTS}
    assert found.subjects["b/rank-1"].key == f"{FOLDER}/b/rank-1"
    assert bucket._client.head_object(Bucket=bucket.name, Key=KEY)["Metadata"] == {
        "git-sha": PROVENANCE.git_sha,
        "image": "vpmoe/trainer:1",
        "config": HEX,
        "run": "team/first-run-0123abcd",
        "step": "vanilla",
        "attempt": "2",
        "sha256": found.sha256,
    }


def test_the_first_manifest_is_not_replaced(bucket: Bucket) -> None:
    first = manifest.write(bucket, KEY, statement())
    assert manifest.write(bucket, KEY, statement(facts={"tokens": 8})) == first
    assert manifest.load(bucket, KEY).facts == {"tokens": 7}


def test_a_manifest_may_lack_git_revision_and_image() -> None:
    by_hand = Provenance(None, None, HEX, "default", "x", "0123abcd", "preprocess", 1, "2026-01-01T00:00:00Z")
    found = manifest.parse("d/manifest.json", json_bytes(statement(provenance=by_hand)))
    assert (
        found.provenance == by_hand
        and "git-sha" not in by_hand.metadata()
        and "image" not in by_hand.metadata()
    )


def test_a_manifest_names_the_harmony_library() -> None:
    """As an input, not as a field of the format: readers of older versions accept it."""
    harmony = replace(PROVENANCE, harmony="pkg:pypi/oss-harmony@0.0.11")
    made = statement(provenance=harmony)
    assert made["predicate"]["buildDefinition"]["resolvedDependencies"][-1] == {
        "name": "harmony",
        "uri": "pkg:pypi/oss-harmony@0.0.11",
        "digest": {},
        "annotations": {},
    }
    assert manifest.parse("d/manifest.json", json_bytes(made)).provenance == harmony
    assert harmony.metadata()["harmony"] == "pkg:pypi/oss-harmony@0.0.11"


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param(
            {"inputs": [DATASET]}, "checkpoint has to name its tokenizer with a digest", id="no-tokenizer"
        ),
        pytest.param(
            {"inputs": [TOKENIZER]}, "checkpoint has to name its dataset with a digest", id="no-dataset"
        ),
        pytest.param(
            {"inputs": [Input("tokenizer", "x", {}, {}), DATASET]},
            "has to name its tokenizer",
            id="no-digest",
        ),
        pytest.param({"subjects": []}, "subject: List should have at least 1 item", id="empty"),
        pytest.param(
            {"subjects": [SUBJECTS[0], SUBJECTS[0]]}, "subject: b/rank-1 is named twice", id="twice"
        ),
        pytest.param({"kind": "Check point"}, "buildType", id="kind"),
        pytest.param({"facts": {"loss": float("nan")}}, "not JSON compliant", id="nan"),
    ],
)
def test_a_statement_that_would_not_load_is_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        statement(**changes)


def test_a_dataset_needs_no_dataset_among_its_inputs() -> None:
    statement(kind="dataset", inputs=[TOKENIZER])


def test_a_subject_outside_its_manifests_folder_is_rejected() -> None:
    with pytest.raises(ValueError, match="runs/xy/f does not lie in runs/x"):
        hash_bytes("runs/xy/f", b"").subject("runs/x")
    assert hash_bytes("runs/x/f", b"").subject("runs/x/").name == "f"


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A function that sets the field at a dotted `path`, or deletes it if `value` is None."""

    def apply(found: Any) -> None:
        *folders, last = path.split(".")
        for name in folders:
            found = found[int(name) if name.isdigit() else name]
        if value is None:
            del found[last]
        else:
            found[last] = value

    return apply


@pytest.mark.parametrize(
    "apply_change, message",
    [
        pytest.param(
            change("_type", "https://in-toto.io/Statement/v0.1"), "_type: Input should be", id="type"
        ),
        pytest.param(change("predicateType", None), "predicateType: Field required", id="no-predicate-type"),
        pytest.param(
            change("subject.0.digest.sha256", "abc"),
            "subject.0.digest.sha256: String should match",
            id="digest",
        ),
        pytest.param(
            change("subject.0.annotations.size", -1),
            "subject.0.annotations.size: .*greater than or equal to 0",
            id="size",
        ),
        pytest.param(
            change("subject.0.annotations.size", "5"),
            "subject.0.annotations.size: Input should be a valid integer",
            id="size-text",
        ),
        pytest.param(
            change("subject.0.annotations.blockSize", 1024),
            "blockSize: Input should be 8388608",
            id="block-size",
        ),
        pytest.param(
            change("subject.1.annotations.blocks", [HEX]),
            f"b/rank-1: {BLOCK + 1} bytes have 2 blocks, not 1",
            id="a-block-short",
        ),
        pytest.param(
            change("subject.0.name", "../elsewhere"), "subject.0.name: String should match", id="outside"
        ),
        pytest.param(change("subject.0.name", "/a"), "subject.0.name: String should match", id="absolute"),
        pytest.param(change("surprise", 1), "surprise: Extra inputs are not permitted", id="unknown-field"),
        pytest.param(
            change("predicate.buildDefinition.buildType", "https://example.com/x"),
            "buildType: String should match",
            id="build-type",
        ),
        pytest.param(
            change("predicate.runDetails.metadata.invocationId", "x"),
            "invocationId: String should match",
            id="invocation",
        ),
        pytest.param(
            change("predicate.runDetails.metadata.startedOn", "today"),
            "startedOn: String should match",
            id="time",
        ),
        pytest.param(
            change("predicate.runDetails.builder.version.gitSha", None),
            "gitSha: Field required",
            id="no-git-sha",
        ),
    ],
)
def test_a_malformed_manifest_is_rejected_with_the_field(
    bucket: Bucket, apply_change: Callable[[dict[str, Any]], None], message: str
) -> None:
    found = statement()
    apply_change(found)
    bucket.put_bytes(KEY, json_bytes(found), {})
    with pytest.raises(
        StorageError, match=rf"^{bucket.url(KEY)}: not a vpMoE manifest: .*{message}.*Delete it"
    ) as caught:
        manifest.load(bucket, KEY)
    assert caught.value.reason == "Altered"


def test_a_manifest_that_is_not_json_is_rejected(bucket: Bucket) -> None:
    bucket.put_bytes(KEY, b"{", {})
    with pytest.raises(StorageError, match="not a vpMoE manifest: content: Invalid JSON"):
        manifest.load(bucket, KEY)


def test_a_missing_manifest_is_reported(bucket: Bucket) -> None:
    with pytest.raises(StorageError, match="there is no such object") as caught:
        manifest.load(bucket, KEY)
    assert caught.value.reason == "Missing"


def test_a_subject_is_read_from_its_entry() -> None:
    for subject in SUBJECTS:
        assert manifest.subject_of(json.loads(json_bytes(manifest.entry(subject))), FOLDER) == subject
