"""Inputs in buckets: what a store's listing lacks, and errors that name the field of the bucket."""

import re

import pytest

from tests.fakes.fault_proxy import Fault, Response, faulty
from tests.fakes.store import S3
from vpmoe.api.storage import StorageSpec
from vpmoe.data.canary import read_texts
from vpmoe.data.inputs import resolve_source
from vpmoe.storage import Bucket, Patience, StorageError
from vpmoe.teacher.model import find_teacher

SHORT_PATIENCE = Patience(attempts=2, connect=2, read=2, first_pause=0.01)


def test_shards_that_are_listed_without_etag_are_pinned_as_they_are_read(
    s3: S3, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.parquet", "b.parquet", "config.json", "model.safetensors"):
        bucket.put_bytes(f"input/{name}", name.encode(), {})
    shards = resolve_source(bucket.url("input/*.parquet"), bucket).shards
    files = find_teacher(bucket.url("input"), bucket).files

    def without_etags(given: Response) -> Response:
        return given[0], given[1], re.sub(rb"<ETag>.*?</ETag>", b"", given[2])

    with faulty(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxied = Bucket.open(StorageSpec(bucket=bucket.name), patience=SHORT_PATIENCE)
        proxy.faults = [Fault("edited", "list-type=2", edit=without_etags)]
        assert resolve_source(bucket.url("input/*.parquet"), proxied).shards == shards
        assert proxy.count("HEAD") == 2, "one for each shard"
        assert find_teacher(bucket.url("input"), proxied).files == files


@pytest.mark.parametrize("field", ["dataset.source", "teacher.model", "evaluation.canary"])
def test_the_field_of_a_missing_bucket_is_named(bucket: Bucket, field: str) -> None:
    read = {
        "dataset.source": lambda: resolve_source("s3://not-there/*.parquet", bucket),
        "teacher.model": lambda: find_teacher("s3://not-there/model", bucket),
        "evaluation.canary": lambda: read_texts("s3://not-there/text", bucket),
    }[field]
    message = rf"s3://not-there/.*the bucket does not exist\. Correct {re.escape(field)} or storage\.endpoint"
    with pytest.raises(StorageError, match=message):
        read()
