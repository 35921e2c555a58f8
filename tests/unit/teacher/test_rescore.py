"""The whole step on a real S3 store with real vLLM: picked documents are scored, aligned and counted, the
same after any failure."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray

from tests.fakes.students import new_seed
from tests.fakes.teacher_steps import provenance, rescore_here
from tests.fakes.tiny_teacher import Remote
from vpmoe.api import DistillRun
from vpmoe.api.stages import Rescored
from vpmoe.data import dataset
from vpmoe.data.index import read_index
from vpmoe.data.preprocess.encode import EncoderPool
from vpmoe.data.preprocess.step import preprocess
from vpmoe.data.system_message import EffortSubstitution
from vpmoe.failure import Permanent, Terminated
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.verify import verify
from vpmoe.teacher import histogram, scores
from vpmoe.teacher.part import MIN_LOGP, to_float16

ROOT = Path(__file__).parents[3]
SCRATCH: Path


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the teacher's files are downloaded to, once for all tests of this module."""
    global SCRATCH
    SCRATCH = tmp_path_factory.mktemp("scratch")


@pytest.fixture
def spec(run_spec: dict[str, Any], sample_parquet: list[Path], stored_teacher: str) -> dict[str, Any]:
    """A run with a Rescored stage, whose dataset is built from the sample."""
    run_spec["spec"]["teacher"]["model"] = stored_teacher
    run_spec["spec"]["dataset"] |= {"sampling": {"nonEnglishMax": 0.6}, "maxLength": 512}
    run_spec["spec"]["stages"].append(
        {"name": "rescored", "kind": "Rescored", "tokens": 8192, "subset": {"fraction": 0.2}}
    )
    run = DistillRun.parse(run_spec)
    bucket = Bucket.open(run.spec.storage)
    for path in sample_parquet:
        bucket.put_file(f"input/{path.name}", path, {})
    with EncoderPool(1) as encoders:
        preprocess(run, bucket, provenance(run, "rescore"), threading.Event(), None, encoders)
    return run_spec


def do(
    spec: dict[str, Any],
    scorer: Remote | None,
    worker: int | None = None,
    stopping: threading.Event | None = None,
) -> list[scores.ScoresRef]:
    return rescore_here(spec, scorer, SCRATCH, worker, stopping)


def made(spec: dict[str, Any], scorer: Remote | None) -> Manifest:
    """The manifest of the run's one set of scores, which the step makes."""
    (found,) = do(spec, scorer)
    return manifest.load(Bucket.open(DistillRun.parse(spec).spec.storage), found.manifest)


def progress(spec: dict[str, Any], bucket: Bucket) -> dict[str, Any]:
    told: dict[str, Any] = bucket.get_json(paths.progress(DistillRun.parse(spec), "rescore"))
    return told


def bytes_of(found: Manifest) -> dict[str, str]:
    return {name: subject.sha256 for name, subject in found.subjects.items()}


def forget(bucket: Bucket, found: scores.ScoresRef) -> None:
    """Delete the set of scores."""
    bucket.delete_prefix(found.folder)


def documents(bucket: Bucket, of: Manifest, stems: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    """Every training document of a dataset or of scores, in order: its row, and its values in each of
    `stems`."""
    types = {"tokens": np.int32, "spans": np.uint8, "logp": np.float16}
    folder = folder / of.kind
    folder.mkdir(exist_ok=True)
    read = []
    for part in range(of.facts["parts"]):
        for name in (f"{stem}.{kind}" for stem in stems for kind in ("bin", "idx")):
            bucket.download(of.subjects[f"train/part-{part:05d}.{name}"], folder / name)
        bucket.download(of.subjects[f"train/part-{part:05d}.documents.parquet"], folder / "rows")
        rows = pq.read_table(folder / "rows").to_pylist()
        for stem in stems:
            index = read_index(folder / f"{stem}.idx")
            values = np.fromfile(folder / f"{stem}.bin", types[stem])
            assert (
                index.dtype == types[stem]
                and len(rows) == len(index.lengths)
                and len(values) == index.lengths.sum()
            )
            for row, offset, length in zip(
                rows, index.offsets // values.itemsize, index.lengths, strict=True
            ):
                row[stem] = values[offset : offset + length]
        read += rows
    return read


def test_every_picked_document_is_scored_and_every_number_can_be_counted_again(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, tmp_path: Path
) -> None:
    spec["spec"]["teacher"]["effort"] = "low"
    spec["spec"]["stages"][1]["subset"] = {"fraction": 0.4}
    found = made(spec, scorer)
    source = dataset.load_dataset(DistillRun.parse(spec), bucket)
    own, said = (
        documents(bucket, source, ("tokens", "spans"), tmp_path),
        documents(bucket, found, ("logp",), tmp_path),
    )
    assert [row["synth_id"] for row in own] == [row["synth_id"] for row in said]
    effort = EffortSubstitution(source.facts["settings"]["conversation"], "low")
    counts: dict[int, Counter[int]] = {1: Counter(), 2: Counter()}
    exercises: Counter[str] = Counter()
    for before, after in zip(own, said, strict=True):
        logp_T: NDArray[np.float16] = after["logp"]
        span_T = before["spans"]
        assert len(logp_T) == len(span_T)
        if not after["scored"]:
            assert logp_T.view(np.uint16).tolist() == [0x7E00] * len(logp_T), (
                "NaN throughout where it was not picked"
            )
            assert after["reasoning"] is None and after["final"] is None
            continue
        assert np.isfinite(logp_T[span_T > 0]).all() and np.isnan(logp_T[-1])
        alone_T = effort.from_teacher(next(scorer.score([effort.to_teacher(before["tokens"])])))
        assert np.array_equal(np.isnan(logp_T), np.isnan(alone_T))
        # The order of summation differs alone and in a batch: 1e-4, as against transformers; float16 rounds
        # by 2^-11.
        assert np.nanmax(np.abs(logp_T.astype(np.float64) - alone_T) - np.abs(alone_T) * 2.0**-11) <= 1e-4
        for span, name in ((1, "reasoning"), (2, "final")):
            of_span = logp_T[span_T == span]
            counts[span].update(of_span.view(np.uint16).tolist())
            if len(of_span):
                assert after[name] == np.float32(of_span.astype(np.float64).mean())
            else:
                assert after[name] is None
        exercises[before["exercise"] or "unknown"] += int((span_T > 0).sum())
    facts = found.facts
    assert 5 < facts["documents"] == sum(row["scored"] for row in said) < len(said)
    for span, name in ((1, "reasoning"), (2, "final")):
        assert facts["histogram"][name] == [list(pair) for pair in sorted(counts[span].items())]
        assert facts["tokens"][name] == counts[span].total() > 100
        values = np.array(list(counts[span].elements()), np.uint16).view(np.float16).astype(np.float64)
        assert facts["mean"][name] == pytest.approx(values.mean(), rel=1e-12)
        assert histogram.dense(facts["histogram"][name]).sum() == len(values)
    assert {name: entry["tokens"] for name, entry in facts["exercises"].items()} == exercises
    assert sum(entry["documents"] for entry in facts["languages"].values()) == facts["documents"]
    assert sum(facts["tokens"].values()) <= 0.4 * (
        source.facts["splits"]["train"]["reasoning"] + source.facts["splits"]["train"]["final"]
    )
    assert (facts["effort"], facts["dataset"]["content"]) == ("low", scores.training_content(source))
    assert found.inputs["dataset"].digest == {"sha256": source.sha256}
    assert progress(spec, bucket)["parts"] == {"done": 3, "total": 3}
    assert not verify(bucket, found.key.rpartition("/")[0], print).failed


def test_a_longest_first_subset_holds_the_longest(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, tmp_path: Path
) -> None:
    spec["spec"]["stages"][1]["subset"] = {"fraction": 0.3, "languages": ["en"], "exercises": ["rag", "mcq"]}
    source = dataset.load_dataset(DistillRun.parse(spec), bucket)
    found = made(spec, scorer)
    own, said = (
        documents(bucket, source, ("tokens", "spans"), tmp_path),
        documents(bucket, found, ("logp",), tmp_path),
    )
    assert found.facts["documents"] > 1
    for exercise in ("rag", "mcq"):
        group = [
            (len(b["spans"][b["spans"] == 1]), a["scored"])
            for b, a in zip(own, said, strict=True)
            if (b["language"], b["exercise"]) == ("en", exercise)
        ]
        assert min((length for length, scored in group if scored), default=0) >= max(
            (length for length, scored in group if not scored), default=0
        )
    assert set(found.facts["exercises"]) <= {"rag", "mcq"} and set(found.facts["languages"]) == {"en"}


def test_finished_scores_are_reused_without_a_teacher(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote
) -> None:
    first = made(spec, scorer)
    spec["metadata"]["name"] = "another-run"
    spec["spec"]["teacher"]["gpus"] = 4
    again = made(spec, None)
    assert again.sha256 == first.sha256
    assert progress(spec, bucket)["message"] == "Reused" and progress(spec, bucket)["state"] == "Succeeded"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda spec: spec["teacher"].update(effort="low"), id="effort"),
        pytest.param(lambda spec: spec["stages"][1]["subset"].update(fraction=0.5), id="subset"),
        pytest.param(lambda spec: spec["dataset"].update(validFraction=0.2), id="dataset"),
    ],
)
def test_what_decides_the_scores_is_their_id(
    spec: dict[str, Any], bucket: Bucket, change: Callable[[dict[str, Any]], None]
) -> None:
    def resolved() -> str:
        run = DistillRun.parse(spec)
        with EncoderPool(1) as encoders:
            preprocess(run, bucket, provenance(run, "rescore"), threading.Event(), None, encoders)
        (stage,) = (stage for stage in run.spec.stages if isinstance(stage, Rescored))
        return scores.resolve_scores(run, stage, bucket, dataset.load_dataset(run, bucket)).id

    before = resolved()
    spec["metadata"]["name"] = "the-same"
    assert resolved() == before
    spec["metadata"]["name"] = "another"
    change(spec["spec"])
    assert resolved() != before


def test_a_stage_that_mixes_in_no_scores_needs_none(spec: dict[str, Any], bucket: Bucket) -> None:
    spec["spec"]["stages"][1]["mix"] = 0.0
    assert do(spec, None) == []
    assert (progress(spec, bucket)["state"], progress(spec, bucket)["message"]) == (
        "Succeeded",
        "No stage trains on scores",
    )


def test_stages_with_the_same_subset_share_their_scores(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote
) -> None:
    stage = spec["spec"]["stages"][1]
    spec["spec"]["stages"] += [
        stage | {"name": "again"},
        stage | {"name": "other", "subset": {"fraction": 0.3, "prefer": "none"}},
    ]
    first, second = do(spec, scorer)
    assert first.id != second.id and bucket.exists(first.manifest) and bucket.exists(second.manifest)
    assert progress(spec, bucket)["parts"] == {"done": 6, "total": 6}


def test_workers_do_not_change_a_byte_and_the_last_one_says_so(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote
) -> None:
    alone = made(spec, scorer)
    forget(bucket, do(spec, None)[0])
    spec["spec"]["teacher"]["gpus"] = 2
    spec["metadata"]["name"] = "two"
    do(spec, scorer, worker=1)
    assert (
        progress(spec, bucket)["state"] == "Running"
        and progress(spec, bucket)["message"] == "Waiting for 2 parts of other workers"
    )
    do(spec, scorer, worker=0)
    assert progress(spec, bucket)["state"] == "Succeeded"
    assert bytes_of(made(spec, None)) == bytes_of(alone)


KILLED = """
import pathlib, sys, yaml
from tests.fakes.tiny_teacher import Remote
from tests.fakes.teacher_steps import rescore_here
rescore_here(yaml.safe_load(open(sys.argv[1])), Remote(sys.argv[2], 640), pathlib.Path(sys.argv[3]))
"""


def test_a_worker_killed_at_any_record_goes_on_there_with_the_same_bytes(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, teacher_address: str, tmp_path: Path
) -> None:
    spec["spec"]["stages"][1]["subset"] = {"fraction": 0.4}
    undisturbed = made(spec, scorer)
    (found,) = do(spec, None)
    forget(bucket, found)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    scorer.close()  # the teacher answers one at a time
    chance = np.random.default_rng(new_seed())
    records: dict[int, str] = {}
    for already in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "run.yaml"), teacher_address, str(SCRATCH)],
            cwd=ROOT,
        )
        try:
            wait_for(
                lambda n=already: (
                    bucket.exists(paths.scores_origin(found.id))
                    and len(scores.done_parts(found, bucket)) >= n
                ),
                process,
            )
            time.sleep(chance.uniform(0, 0.5))
        finally:
            process.kill()
            process.wait()
        for part, etag in records.items():
            assert bucket.head(paths.scores_record(found.id, part)).etag == etag, (
                "a part that is done is not made again"
            )
        records = {
            part: bucket.head(paths.scores_record(found.id, part)).etag
            for part in scores.done_parts(found, bucket)
        }
        assert len(records) >= already
    if bucket.exists(found.manifest):
        bucket.delete(found.manifest)  # killed too late: undo the last write
    with Remote(teacher_address, scorer.max_length) as after:
        assert bytes_of(made(spec, after)) == bytes_of(undisturbed)


def wait_for(true: Callable[[], bool], process: "subprocess.Popen[Any]", seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_a_worker_that_is_asked_to_stop_does_so_before_the_next_batch(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec["spec"]["stages"][1]["subset"] = {"fraction": 0.4}
    monkeypatch.setattr("tests.fakes.tiny_teacher.BATCH_TOKENS", 300)
    stopping = threading.Event()
    asked = scorer.score

    def score(*arguments: Any) -> Any:
        for answered, logp_S in enumerate(asked(*arguments)):
            if answered == 1:
                stopping.set()
            yield logp_S

    monkeypatch.setattr(scorer, "score", score)
    with pytest.raises(
        Terminated, match="rescore was asked to stop; the parts that are done are in the bucket"
    ):
        do(spec, scorer, stopping=stopping)
    assert scorer.sequences <= 5
    run = DistillRun.parse(spec)
    (found,) = scores.resolve_all_scores(run, bucket, dataset.load_dataset(run, bucket))
    assert not [
        seen.key for seen in bucket.list(found.folder) if "/train/" in seen.key or "/parts/" in seen.key
    ]


def test_scores_of_another_content_are_refused(spec: dict[str, Any], bucket: Bucket, scorer: Remote) -> None:
    """The dataset was deleted and built again with other bytes under the same id, for instance by another
    build of the tokenizer."""
    run = DistillRun.parse(spec)
    made(spec, scorer)
    (found,) = do(spec, None)
    source = bucket.get_json(dataset.resolve_dataset(run, bucket).manifest)
    (spans,) = (entry for entry in source["subject"] if entry["name"] == "train/part-00001.spans.bin")
    spans["digest"]["sha256"] = "0" * 64
    bucket.delete(dataset.resolve_dataset(run, bucket).manifest)
    bucket.write_json(dataset.resolve_dataset(run, bucket).manifest, source)
    refused = (
        rf"the scores are of content {found.content}, but dataset .* Delete "
        rf"s3://.*/scores/{found.id} to have it scored again"
    )
    with pytest.raises(Permanent, match=f"manifest.json: {refused}"):
        do(spec, scorer)
    (changed,) = scores.resolve_all_scores(run, bucket, dataset.load_dataset(run, bucket))
    with pytest.raises(Permanent, match=refused):
        scores.load_scores(changed, bucket)
    bucket.delete(found.manifest)
    with pytest.raises(Permanent, match=f"origin.json: {refused}"):
        do(spec, scorer)


def test_a_subset_of_nothing_is_an_error(spec: dict[str, Any], scorer: Remote) -> None:
    spec["spec"]["stages"][1]["subset"] = {"exercises": ["cocking"]}
    with pytest.raises(
        Permanent, match=r"subset: no document is picked. .*/datasets/[0-9a-f]+/manifest.json has the names"
    ):
        do(spec, scorer)


def test_without_a_data_set_there_is_nothing_to_score(spec: dict[str, Any], bucket: Bucket) -> None:
    bucket.delete(dataset.resolve_dataset(DistillRun.parse(spec), bucket).manifest)
    with pytest.raises(
        Permanent, match=r"the run's dataset is not built yet. Run python -m jobs.preprocess first"
    ):
        do(spec, None)


def test_a_teacher_that_gives_no_number_is_refused(
    spec: dict[str, Any], scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that overflow; no small real model can be made to do so at one position of one document."""
    asked = scorer.score
    monkeypatch.setattr(
        scorer,
        "score",
        lambda *arguments: (np.where(np.arange(len(p)) == len(p) - 3, np.nan, p) for p in asked(*arguments)),
    )
    with pytest.raises(
        Permanent,
        match=(
            r"teacher.model: document \d+ of training part 0 \(.*\): the teacher gave 1 of "
            r"its tokens no prob"
        ),
    ):
        do(spec, scorer)


@pytest.mark.parametrize(
    "value, bits",
    [
        (-np.inf, 0xD640),
        (-1000.0, 0xD640),
        (-100.0, 0xD640),
        (-np.nan, 0x7E00),
        (0.0, 0x0000),
        (-0.5, 0xB800),
    ],
)
def test_what_is_stored_has_one_form(value: float, bits: int) -> None:
    assert to_float16(np.array([value], np.float32)).view(np.uint16).tolist() == [bits]
    assert np.array([0xD640], np.uint16).view(np.float16)[0] == MIN_LOGP


def test_the_job_ends_when_told_goes_on_when_started_again_and_has_nothing_to_do_at_last(
    spec: dict[str, Any],
    bucket: Bucket,
    scorer: Remote,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a pod runs it: with its own vLLM, or without one if there is nothing to do. The attempt between uses
    the shared teacher."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(tmp_path),
        "VPMOE_TERMINATION_LOG": str(tmp_path / "end"),
    }

    def start() -> "subprocess.Popen[str]":
        command = [
            sys.executable,
            "-m",
            "jobs.rescore",
            "--run",
            str(tmp_path / "run.yaml"),
            "--step",
            "rescore",
        ]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    run = DistillRun.parse(spec)
    (found,) = scores.resolve_all_scores(run, bucket, dataset.load_dataset(run, bucket))
    process = start()
    wait_for(lambda: bool(scores.done_parts(found, bucket)), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert json.loads((tmp_path / "end").read_text())["class"] == "Terminated"
    kept = scores.done_parts(found, bucket)
    assert 1 <= len(kept) < 3
    assert not list(tmp_path.glob("vpmoe-scores-*")), "no part's files are left"
    caplog.set_level("INFO")
    do(spec, scorer)
    assert bucket.exists(found.manifest) and "Scored part" in caplog.text
    assert f"Scored part {min(kept)}:" not in caplog.text, "a part that is done is not made again"
    process = start()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Reused" in said and "Loading the teacher" not in said
    assert progress(spec, bucket)["message"] == "Reused"
