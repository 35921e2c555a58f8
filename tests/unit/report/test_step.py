"""The report step: the page is in the bucket, for a browser, and is replaced by the next one."""

import threading

import pytest

from tests.fakes import recorded_run
from tests.fakes.store import S3
from vpmoe.api.progress import Progress
from vpmoe.failure import Terminated
from vpmoe.process.board import ProgressBoard
from vpmoe.process.run_folder import open_run
from vpmoe.provenance import Provenance
from vpmoe.report.step import write_report
from vpmoe.storage import paths


def provenance(step: str) -> Provenance:
    return Provenance(None, None, "c" * 64, "team", "inflight", "0a1b2c3d", step, 1, "2026-01-01T00:00:00Z")


def test_the_page_is_written_with_relative_links_and_replaced_by_the_next(s3: S3) -> None:
    url = recorded_run.store(s3)
    run, bucket = open_run(url)
    board = ProgressBoard()
    write_report(run, bucket, provenance("vanilla-report"), threading.Event(), board)
    first = bucket.get(paths.report(run)).decode()
    assert 'href="../checkpoints/onpolicy/22/manifest.json"' in first and 'href="../run.json"' in first
    dataset = next(found.key for found in bucket.list("datasets/") if found.key.endswith("/manifest.json"))
    assert f'href="../../../../{dataset}"' in first
    head = bucket._client.head_object(Bucket=bucket.name, Key=bucket.prefix + paths.report(run))
    assert head["ContentType"] == "text/html; charset=utf-8"
    stored = Progress.model_validate(bucket.get_json(paths.progress(run, "vanilla-report")))
    assert stored == board.progress and stored.state == "Succeeded"
    assert stored.message.startswith(f"Wrote {url}/report/index.html, 4.")
    bucket.delete(paths.progress(run, "onpolicy"))
    write_report(run, bucket, provenance("onpolicy-report"), threading.Event(), board)
    assert bucket.get(paths.report(run)).decode() != first


def test_a_report_that_is_asked_to_stop_writes_no_page(s3: S3) -> None:
    run, bucket = open_run(recorded_run.store(s3))
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(Terminated):
        write_report(run, bucket, provenance("vanilla-report"), stopping, ProgressBoard())
    assert not bucket.exists(paths.report(run))
