"""What is read of a recorded run with stages of all kinds, of parts of it, and of damaged objects."""

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from tests.fakes import recorded_run
from tests.fakes.recorded_run import DOCUMENTS, RUN, keep_only, lines
from tests.fakes.store import S3
from vpmoe.failure import Permanent
from vpmoe.process.run_folder import open_run
from vpmoe.report.run_data import (
    COMPLETION_TOKENS,
    LOGP_BINS,
    LOWEST_LOGP,
    RunData,
    line_seconds,
    read_run_data,
)
from vpmoe.storage.bucket import Bucket, Object

FOLDER = f"tiny/{RUN}"


def test_every_step_has_its_metrics_in_order_and_its_progress(recorded_data: RunData) -> None:
    names = [name for name in recorded_data.run.steps() if not name.endswith("-report")]
    assert [step.name for step in recorded_data.steps] == names
    for step in recorded_data.steps:
        found = sorted(lines(step.name), key=lambda line: str(line["time"]))
        assert list(step.lines) == found, step.name
    states = {step.name: step.state for step in recorded_data.steps}
    assert states.pop("onpolicy-export") == "Waiting"  # the recorded version had no export
    assert set(states.values()) == {"Succeeded"}
    assert sum(map(len, (lines("vanilla"), lines("onpolicy")))) > 15


def test_activities_are_from_the_start_of_the_first_work_to_the_last_record(recorded_data: RunData) -> None:
    of_vanilla = [found for found in recorded_data.activities if found.step == "vanilla"]
    assert [found.attempt for found in of_vanilla] == [1, 2]
    assert of_vanilla[0].start == datetime(2026, 11, 28, 1, 9, 38, 679000, UTC)  # its line "start"
    (sampler,) = [found for found in recorded_data.activities if found.step == "onpolicy-sampler"]
    first = lines("onpolicy-sampler")[0]
    seconds = (datetime.fromisoformat(str(first["time"])) - sampler.start).total_seconds()
    assert seconds == pytest.approx(first["seconds"] + first["waitWeights"], abs=1e-5)  # type: ignore[operator]


def test_a_wait_for_an_upload_is_before_a_samplers_line_and_after_a_trainers() -> None:
    (first, *_), (step, *_) = lines("onpolicy-sampler"), lines("onpolicy", "step")
    assert line_seconds(first | {"waitUpload": 2.0}) == pytest.approx(line_seconds(first) + 2.0)
    assert line_seconds(step | {"waitUpload": 2.0}) == line_seconds(step) == step["seconds"]


def test_the_histograms_count_each_scored_token_once(recorded_data: RunData) -> None:
    (name,) = [
        name for name in DOCUMENTS if name.startswith("tiny/scores/") and name.endswith("/manifest.json")
    ]
    facts = json.loads(DOCUMENTS[name])["predicate"]["buildDefinition"]["internalParameters"]
    edges = np.linspace(LOWEST_LOGP, 0, LOGP_BINS + 1)
    of_documents, *of_windows = recorded_data.teacher_logp
    for span, counts in of_documents.counts.items():
        values = np.concatenate(
            [
                np.full(count, np.uint16(bits).view(np.float16), np.float64)
                for bits, count in facts["histogram"][span]
            ]
        )
        inside = np.maximum(values, LOWEST_LOGP)
        expected = [int(((inside >= low) & (inside < high)).sum()) for low, high in pairwise(edges)]
        expected[-1] += int((inside == 0).sum())
        assert counts.tolist() == expected
    assert [found.tokens for found in of_windows] == ["onpolicy window 0", "onpolicy window 3"]
    table = pa.ipc.open_file(DOCUMENTS[f"{FOLDER}/rollouts/onpolicy/window-000000.scores.arrow"]).read_all()
    assert sum(int(counts.sum()) for counts in of_windows[0].counts.values()) == sum(map(len, table["logp"]))


def test_a_completion_has_its_tokens_text_and_both_models_log_p(recorded_data: RunData) -> None:
    folder = f"{FOLDER}/rollouts/onpolicy/window-000000"
    rollouts = pa.ipc.open_file(DOCUMENTS[f"{folder}.rollouts.arrow"]).read_all().to_pylist()
    scores = pa.ipc.open_file(DOCUMENTS[f"{folder}.scores.arrow"]).read_all()["logp"].to_pylist()
    first = recorded_data.completions[0]
    assert (first.stage, first.window, first.effort, first.validity) == ("onpolicy", 0, "medium", "valid")
    place = next(number for number, row in enumerate(rollouts) if row["validity"] == "valid")
    assert [token.teacher for token in first.tokens] == scores[place][:COMPLETION_TOKENS]
    assert [token.student for token in first.tokens] == rollouts[place]["logp"][:COMPLETION_TOKENS]
    assert first.length == len(scores[place])
    assert any(token.special and token.text == "<|channel|>" for token in first.tokens)
    assert "<|" not in first.question and first.question


def test_manifests_are_the_latest_of_each_stage(recorded_data: RunData) -> None:
    found = [(one.kind, one.provenance.step) for one in recorded_data.manifests]
    assert found == [
        ("dataset", "preprocess"),
        ("scores", "rescore"),
        ("checkpoint", "vanilla"),
        ("checkpoint", "rescored"),
        ("checkpoint", "forced"),
        ("checkpoint", "onpolicy"),
        ("weights", "onpolicy"),
    ]
    assert recorded_data.manifests[2].key.endswith("/checkpoints/vanilla/5/manifest.json")
    assert recorded_data.manifests[5].key.endswith("/checkpoints/onpolicy/22/manifest.json")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        pytest.param("steps/vanilla/metrics/000000-a1-0-2.jsonl", "{", "lines of metrics", id="no-json"),
        pytest.param("steps/vanilla/metrics/000000-a1-0-2.jsonl", "{}", "KeyError: 'time'", id="no-line"),
        pytest.param("steps/vanilla/progress.json", "{}", "Field required", id="no-progress"),
    ],
)
def test_a_damaged_object_is_named(s3: S3, name: str, content: str, fault: str) -> None:
    url = recorded_run.store(s3, lambda folder: (folder / name).write_text(content))
    run, bucket = open_run(url)
    with pytest.raises(Permanent, match=fault) as error:
        read_run_data(run, bucket)
    assert str(error.value).startswith(f"{url}/{name}: ")
    assert "delete it" in str(error.value)


def test_a_run_of_which_only_the_configuration_is_there_is_read(s3: S3) -> None:
    found = read_run_data(*open_run(recorded_run.store(s3, keep_only("run.json"))))
    assert {step.state for step in found.steps} == {"Waiting"}
    assert not found.activities and not found.manifests and not found.completions and not found.evaluations


def test_an_object_that_is_deleted_meanwhile_counts_as_never_there(s3: S3) -> None:
    run, bucket = open_run(recorded_run.store(s3))

    class Deleting(Bucket):
        """A bucket whose checkpoints and windows are deleted when they have been listed."""

        def list(self, prefix: str, after: str = "") -> Iterator[Object]:
            yield from list(super().list(prefix, after))
            for folder in ("checkpoints", "rollouts"):
                shutil.rmtree(s3.folder / self.name / "tiny" / RUN / folder, ignore_errors=True)

    bucket.__class__ = Deleting
    found = read_run_data(run, bucket)
    assert not found.completions
    # The recorded version wrote no metrics while it rescored: only a checkpoint names the scores.
    assert {one.kind for one in found.manifests} == {"dataset", "weights"}
