"""The data of a report of a recorded run, and the browser that opens its page."""

from collections.abc import Iterator

import pytest

from tests.fakes import browser as chromium
from tests.fakes import recorded_run, task_records
from tests.fakes.store import S3
from vpmoe.process.run_folder import open_run
from vpmoe.report.run_data import RunData, read_run_data
from vpmoe.storage import paths


@pytest.fixture(scope="session")
def recorded_data(s3: S3) -> RunData:
    run, bucket = open_run(recorded_run.store(s3))
    for stage in ("vanilla", "onpolicy"):
        bucket.write_json(paths.task_evaluation(run, stage), task_records.record(stage).dump())
    return read_run_data(run, bucket)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.browser(tmp_path_factory.mktemp("browser")) as it:
        yield it
