"""The key of every object in the bucket, and addresses s3://bucket/key."""

import pytest

from vpmoe.api import DistillRun
from vpmoe.storage import paths

UID = "0123abcd-4567-89ab-cdef-0123456789ab"
RUN = DistillRun.parse(
    {
        "apiVersion": "vpmoe.dev/v1alpha1",
        "kind": "DistillRun",
        "metadata": {"name": "first-run", "namespace": "team", "uid": UID},
        "spec": {
            "dataset": {"source": "s3://corpora/synth/*.parquet"},
            "teacher": {"model": "s3://models/teacher"},
            "storage": {"bucket": "vpmoe", "prefix": "below"},
            "stages": [{"name": "vanilla", "kind": "Vanilla", "tokens": "1B"}],
        },
    }
)
FOLDER = "runs/team/first-run-0123abcd"


@pytest.mark.parametrize(
    "key, expected",
    [
        (paths.dataset("d1"), "datasets/d1"),
        (paths.dataset_part("d1", "valid", 7, "tokens.bin"), "datasets/d1/valid/part-00007.tokens.bin"),
        (
            paths.dataset_part("d1", "train", 12345, "documents.parquet"),
            "datasets/d1/train/part-12345.documents.parquet",
        ),
        (paths.census("d1", 7), "datasets/d1/census/part-00007.json"),
        (paths.document_hashes("d1", 7), "datasets/d1/hashes/part-00007.bin"),
        (paths.part_record("d1", 7), "datasets/d1/parts/part-00007.json"),
        (paths.manifest(paths.dataset("d1")), "datasets/d1/manifest.json"),
        (paths.scores("s1"), "scores/s1"),
        (paths.scores_part("s1", 7, "logp.idx"), "scores/s1/train/part-00007.logp.idx"),
        (paths.scores_part("s1", 7, "documents.parquet"), "scores/s1/train/part-00007.documents.parquet"),
        (paths.scores_origin("s1"), "scores/s1/origin.json"),
        (paths.scores_record("s1", 7), "scores/s1/parts/part-00007.json"),
        (paths.run(RUN), FOLDER),
        (paths.run_json(RUN), f"{FOLDER}/run.json"),
        (paths.inputs(RUN), f"{FOLDER}/inputs.json"),
        (paths.teacher(RUN), f"{FOLDER}/teacher.json"),
        (paths.progress(RUN, "vanilla"), f"{FOLDER}/steps/vanilla/progress.json"),
        (paths.metrics(RUN, "vanilla", "00000001"), f"{FOLDER}/steps/vanilla/metrics/00000001.jsonl"),
        (paths.validity(RUN, "vanilla", 3), f"{FOLDER}/steps/vanilla-validity/evaluation-000003.json"),
        (paths.known_validity(RUN, "vanilla", 90), f"{FOLDER}/steps/vanilla/validity-90.json"),
        (paths.evaluation(RUN, "vanilla"), f"{FOLDER}/steps/vanilla-evaluate/evaluation.json"),
        (
            paths.evaluation_part(RUN, "vanilla", "canary", "0123456789abcdef" * 4),
            f"{FOLDER}/steps/vanilla-evaluate/parts/canary-0123456789abcdef.json",
        ),
        (paths.checkpoints(RUN, "vanilla"), f"{FOLDER}/checkpoints/vanilla"),
        (paths.checkpoint(RUN, "vanilla", 100), f"{FOLDER}/checkpoints/vanilla/100"),
        (paths.weights(RUN, "onpolicy", 12), f"{FOLDER}/weights/onpolicy/v000012"),
        (
            paths.window(RUN, "onpolicy", 0, "rollouts"),
            f"{FOLDER}/rollouts/onpolicy/window-000000.rollouts.arrow",
        ),
    ],
    ids=lambda value: value,
)
def test_every_object_has_its_documented_key(key: str, expected: str) -> None:
    assert key == expected


@pytest.mark.parametrize(
    "url, parts",
    [
        ("s3://b/k/e/y", ("b", "k/e/y")),
        ("s3://b/", ("b", "")),
        ("s3://b", ("b", "")),
    ],
)
def test_an_address_is_split_into_bucket_and_key(url: str, parts: tuple[str, str]) -> None:
    assert paths.split_url(url) == parts


@pytest.mark.parametrize("url", ["", "b/k", "s3:///k", "https://b/k"])
def test_an_invalid_address_is_rejected(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not an S3 URL\. Write s3://bucket/key"):
        paths.split_url(url)
