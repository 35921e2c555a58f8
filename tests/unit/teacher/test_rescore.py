"""The rescore step on a real S3 store with real vLLM: picked documents are scored, aligned and counted, with
the same result after any failure."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray

from demo import sample
from tests.fakes.students import new_seed
from tests.fakes.teacher_steps import UniformTeacher, provenance, rescore_here
from tests.fakes.tiny_teacher import Remote
from vpmoe.api import DistillRun
from vpmoe.api.stages import Rescored
from vpmoe.data import dataset
from vpmoe.data.index import read_index
from vpmoe.data.preprocess.encode import EncoderPool
from vpmoe.data.preprocess.step import preprocess
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.data.system_message import EffortSubstitution
from vpmoe.failure import Permanent, Terminated
from vpmoe.process.board import ProgressBoard
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.verify import verify
from vpmoe.teacher import histogram, scores
from vpmoe.teacher.part import MIN_LOGP, to_float16
from vpmoe.trainer.data.scored_documents import ScoredDocuments

ROOT = Path(__file__).parents[3]
SCRATCH: Path


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Set SCRATCH: the folder of the downloaded teacher, shared by the tests of this module."""
    global SCRATCH
    SCRATCH = tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def encoders() -> Iterator[EncoderPool]:
    """An encoding process for all tests of this module: it loads the vocabulary."""
    with EncoderPool(1) as pool:
        yield pool


@pytest.fixture
def spec(
    run_spec: dict[str, Any], sample_parquet: list[Path], stored_teacher: str, encoders: EncoderPool
) -> dict[str, Any]:
    """A run with a Rescored stage, whose dataset is built from the sample."""
    run_spec["spec"]["teacher"]["model"] = stored_teacher
    run_spec["spec"]["dataset"] |= {
        "sampling": {"nonEnglishMax": 0.6},
        "maxLength": 512,
        "conversation": {"effort": "low=0.3,medium=0.3,high=0.4"},
    }
    run_spec["spec"]["stages"].append(
        {"name": "rescored", "kind": "Rescored", "tokens": 8192, "subset": {"fraction": 0.2}}
    )
    run = DistillRun.parse(run_spec)
    bucket = Bucket.open(run.spec.storage)
    for path in sample_parquet:
        bucket.put_file(f"input/{path.name}", path, {})
    preprocess(run, bucket, provenance(run, "rescore"), threading.Event(), ProgressBoard(), None, encoders)
    return run_spec


def run_rescore(
    spec: dict[str, Any],
    scorer: Remote | UniformTeacher | None,
    worker: int | None = None,
    stopping: threading.Event | None = None,
) -> list[scores.ScoresRef]:
    return rescore_here(spec, scorer, SCRATCH, worker, stopping)


def run_for_manifest(spec: dict[str, Any], scorer: Remote | None) -> Manifest:
    """Run the step; returns the manifest of the run's only set of scores."""
    (ref,) = run_rescore(spec, scorer)
    return manifest.load(Bucket.open(DistillRun.parse(spec).spec.storage), ref.manifest)


def progress(spec: dict[str, Any], bucket: Bucket) -> dict[str, Any]:
    content: dict[str, Any] = bucket.get_json(paths.progress(DistillRun.parse(spec), "rescore"))
    return content


def subject_digests(written: Manifest) -> dict[str, str]:
    return {name: subject.sha256 for name, subject in written.subjects.items()}


def delete_scores(bucket: Bucket, ref: scores.ScoresRef) -> None:
    """Delete the set of scores."""
    bucket.delete_prefix(ref.folder)


def read_documents(
    bucket: Bucket, source: Manifest, stems: tuple[str, ...], folder: Path
) -> list[dict[str, Any]]:
    """The training documents of a dataset or of scores, in order: the row of each, with its values of each of
    `stems`."""
    types = {"tokens": np.int32, "spans": np.uint8, "logp": np.float16}
    folder = folder / source.kind
    folder.mkdir(exist_ok=True)
    rows_read = []
    for part in range(source.facts["parts"]):
        for name in (f"{stem}.{kind}" for stem in stems for kind in ("bin", "idx")):
            bucket.download(source.subjects[f"train/part-{part:05d}.{name}"], folder / name)
        bucket.download(source.subjects[f"train/part-{part:05d}.documents.parquet"], folder / "rows")
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
        rows_read += rows
    return rows_read


def test_picked_documents_are_scored_and_the_facts_equal_a_recount(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spec["spec"]["teacher"]["effort"] = "low"
    spec["spec"]["stages"][1]["subset"] = {"fraction": 0.4}
    written = run_for_manifest(spec, scorer)
    assert not list(tmp_path.glob("vpmoe-scores-*")), "the files of finished parts are deleted"
    source = dataset.load_dataset(DistillRun.parse(spec), bucket)
    source_rows, score_rows = (
        read_documents(bucket, source, ("tokens", "spans"), tmp_path),
        read_documents(bucket, written, ("logp",), tmp_path),
    )
    assert [row["synth_id"] for row in source_rows] == [row["synth_id"] for row in score_rows]
    assert {row["effort"] for row in source_rows} == {"low", "medium", "high"}
    effort = EffortSubstitution(source.facts["settings"]["conversation"], "low")
    counts: dict[int, Counter[int]] = {1: Counter(), 2: Counter()}
    tokens_of_exercise: Counter[str] = Counter()
    for source_row, score_row in zip(source_rows, score_rows, strict=True):
        logp_T: NDArray[np.float16] = score_row["logp"]
        span_T = source_row["spans"]
        assert len(logp_T) == len(span_T)
        if not score_row["scored"]:
            assert logp_T.view(np.uint16).tolist() == [0x7E00] * len(logp_T), (
                "a document that was not picked has NaN scores"
            )
            assert score_row["reasoning"] is None and score_row["final"] is None
            continue
        assert np.isfinite(logp_T[span_T > 0]).all() and np.isnan(logp_T[-1])
        ids_T = source_row["tokens"]
        separate_T = effort.from_teacher(ids_T, next(scorer.score([effort.to_teacher(ids_T)])))
        assert np.array_equal(np.isnan(logp_T), np.isnan(separate_T))
        # The order of summation differs between a single document and a batch: 1e-4, as against transformers.
        # float16 rounds by 2^-11.
        assert (
            np.nanmax(np.abs(logp_T.astype(np.float64) - separate_T) - np.abs(separate_T) * 2.0**-11) <= 1e-4
        )
        for span, name in ((1, "reasoning"), (2, "final")):
            logp_S = logp_T[span_T == span]
            counts[span].update(logp_S.view(np.uint16).tolist())
            if len(logp_S):
                assert score_row[name] == np.float32(logp_S.astype(np.float64).mean())
            else:
                assert score_row[name] is None
        tokens_of_exercise[source_row["exercise"] or "unknown"] += int((span_T > 0).sum())
    facts = written.facts
    assert 5 < facts["documents"] == sum(row["scored"] for row in score_rows) < len(score_rows)
    for span, name in ((1, "reasoning"), (2, "final")):
        assert facts["histogram"][name] == [list(pair) for pair in sorted(counts[span].items())]
        assert facts["tokens"][name] == counts[span].total() > 100
        values = np.array(list(counts[span].elements()), np.uint16).view(np.float16).astype(np.float64)
        assert facts["mean"][name] == pytest.approx(values.mean(), rel=1e-12)
        assert histogram.dense(facts["histogram"][name]).sum() == len(values)
    assert {name: entry["tokens"] for name, entry in facts["exercises"].items()} == tokens_of_exercise
    assert sum(entry["documents"] for entry in facts["languages"].values()) == facts["documents"]
    assert sum(facts["tokens"].values()) <= 0.4 * (
        source.facts["splits"]["train"]["reasoning"] + source.facts["splits"]["train"]["final"]
    )
    assert (facts["effort"], facts["dataset"]["content"]) == ("low", scores.training_content(source))
    assert written.inputs["dataset"].digest == {"sha256": source.sha256}
    assert progress(spec, bucket)["parts"] == {"done": 3, "total": 3}
    folder = paths.metrics(DistillRun.parse(spec), "rescore", "").removesuffix(".jsonl")
    lines = [bucket.get_json(found.key) for found in bucket.list(folder)]
    assert [(line["event"], line["part"]) for line in lines] == [("part", 0), ("part", 1), ("part", 2)]
    assert sum(line["documents"] for line in lines) == facts["documents"]
    assert sum(line["tokens"] for line in lines) == sum(facts["tokens"].values())
    assert all(line["gpu"]["reason"] == "not measured" for line in lines), "the job gives it a meter"
    assert not verify(bucket, written.key.rpartition("/")[0], print).failed


def test_a_longest_first_subset_has_the_longest_documents_of_each_group(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, tmp_path: Path
) -> None:
    spec["spec"]["stages"][1]["subset"] = {"fraction": 0.3, "languages": ["en"], "exercises": ["rag", "mcq"]}
    source = dataset.load_dataset(DistillRun.parse(spec), bucket)
    written = run_for_manifest(spec, scorer)
    source_rows, score_rows = (
        read_documents(bucket, source, ("tokens", "spans"), tmp_path),
        read_documents(bucket, written, ("logp",), tmp_path),
    )
    assert written.facts["documents"] > 1
    for exercise in ("rag", "mcq"):
        group = [
            (len(source_row["spans"][source_row["spans"] == 1]), score_row["scored"])
            for source_row, score_row in zip(source_rows, score_rows, strict=True)
            if (source_row["language"], source_row["exercise"]) == ("en", exercise)
        ]
        assert min((length for length, scored in group if scored), default=0) >= max(
            (length for length, scored in group if not scored), default=0
        )
    assert set(written.facts["exercises"]) <= {"rag", "mcq"} and set(written.facts["languages"]) == {"en"}


def test_finished_scores_are_reused_without_a_teacher(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote
) -> None:
    first = run_for_manifest(spec, scorer)
    spec["metadata"]["name"] = "another-run"
    spec["spec"]["teacher"]["gpus"] = 4
    again = run_for_manifest(spec, None)
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
def test_the_id_of_scores_depends_on_what_changes_them(
    spec: dict[str, Any],
    bucket: Bucket,
    encoders: EncoderPool,
    change: Callable[[dict[str, Any]], None],
) -> None:
    def resolved() -> str:
        run = DistillRun.parse(spec)
        preprocess(
            run, bucket, provenance(run, "rescore"), threading.Event(), ProgressBoard(), None, encoders
        )
        (stage,) = (stage for stage in run.spec.stages if isinstance(stage, Rescored))
        return scores.resolve_scores(run, stage, bucket, dataset.load_dataset(run, bucket)).id

    before = resolved()
    spec["metadata"]["name"] = "the-same"
    assert resolved() == before
    spec["metadata"]["name"] = "another"
    change(spec["spec"])
    assert resolved() != before


def test_a_stage_with_mix_0_needs_no_scores(spec: dict[str, Any], bucket: Bucket) -> None:
    spec["spec"]["stages"][1]["mix"] = 0.0
    assert run_rescore(spec, None) == []
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
    first, second = run_rescore(spec, scorer)
    assert first.id != second.id and bucket.exists(first.manifest) and bucket.exists(second.manifest)
    assert progress(spec, bucket)["parts"] == {"done": 6, "total": 6}


def test_two_workers_write_the_same_bytes_as_one_and_the_last_reports_success(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote
) -> None:
    by_one_worker = run_for_manifest(spec, scorer)
    delete_scores(bucket, run_rescore(spec, None)[0])
    spec["spec"]["rescore"] = {"gpus": 2}
    spec["metadata"]["name"] = "two"
    run_rescore(spec, scorer, worker=1)
    assert (
        progress(spec, bucket)["state"] == "Running"
        and progress(spec, bucket)["message"] == "Waiting for 2 parts of other workers"
    )
    run_rescore(spec, scorer, worker=0)
    assert progress(spec, bucket)["state"] == "Succeeded"
    assert subject_digests(run_for_manifest(spec, None)) == subject_digests(by_one_worker)


RESCORE_PROCESS = """
import pathlib, sys, yaml
from tests.fakes.tiny_teacher import Remote
from tests.fakes.teacher_steps import rescore_here
rescore_here(yaml.safe_load(open(sys.argv[1])), Remote(sys.argv[2], 640), pathlib.Path(sys.argv[3]))
"""


def test_a_killed_worker_resumes_after_its_last_finished_part_with_the_same_bytes(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, teacher_address: str, tmp_path: Path
) -> None:
    spec["spec"]["stages"][1]["subset"] = {"fraction": 0.4}
    uninterrupted = run_for_manifest(spec, scorer)
    (ref,) = run_rescore(spec, None)
    delete_scores(bucket, ref)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    scorer.close()  # the teacher serves one client at a time
    random = np.random.default_rng(new_seed())
    records: dict[int, str] = {}
    for finished in range(3):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                RESCORE_PROCESS,
                str(tmp_path / "run.yaml"),
                teacher_address,
                str(SCRATCH),
            ],
            cwd=ROOT,
        )
        try:
            wait_while_running(
                lambda n=finished: (
                    bucket.exists(paths.scores_origin(ref.id)) and len(scores.done_parts(ref, bucket)) >= n
                ),
                process,
            )
            time.sleep(random.uniform(0, 0.5))
        finally:
            process.kill()
            process.wait()
        for part, etag in records.items():
            assert bucket.head(paths.scores_record(ref.id, part)).etag == etag, (
                "a finished part is not scored again"
            )
        records = {
            part: bucket.head(paths.scores_record(ref.id, part)).etag
            for part in scores.done_parts(ref, bucket)
        }
        assert len(records) >= finished
    if bucket.exists(ref.manifest):
        bucket.delete(ref.manifest)  # the worker had finished before it was killed: undo its last write
    with Remote(teacher_address, scorer.max_length) as remote:
        assert subject_digests(run_for_manifest(spec, remote)) == subject_digests(uninterrupted)


def wait_while_running(
    condition: Callable[[], bool], process: "subprocess.Popen[Any]", seconds: float = 120
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_a_worker_stops_before_the_next_batch(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec["spec"]["stages"][1]["subset"] = {"fraction": 0.4}
    monkeypatch.setattr("tests.fakes.tiny_teacher.BATCH_TOKENS", 300)
    stopping = threading.Event()
    score_batches = scorer.score

    def score(*arguments: Any) -> Any:
        for number, logp_S in enumerate(score_batches(*arguments)):
            if number == 1:
                stopping.set()
            yield logp_S

    monkeypatch.setattr(scorer, "score", score)
    with pytest.raises(
        Terminated, match="rescore was asked to stop; the parts that are done are in the bucket"
    ):
        run_rescore(spec, scorer, stopping=stopping)
    assert scorer.sequences <= 5
    run = DistillRun.parse(spec)
    (found,) = scores.resolve_all_scores(run, bucket, dataset.load_dataset(run, bucket))
    assert not [
        seen.key for seen in bucket.list(found.folder) if "/train/" in seen.key or "/parts/" in seen.key
    ]


def test_scores_of_another_content_are_rejected(spec: dict[str, Any], bucket: Bucket, scorer: Remote) -> None:
    """A dataset was deleted and rebuilt with other bytes under the same id, for instance by another build of
    the tokenizer."""
    run = DistillRun.parse(spec)
    run_for_manifest(spec, scorer)
    (found,) = run_rescore(spec, None)
    source = bucket.get_json(dataset.resolve_dataset(run, bucket).manifest)
    (spans,) = (entry for entry in source["subject"] if entry["name"] == "train/part-00001.spans.bin")
    spans["digest"]["sha256"] = "0" * 64
    bucket.delete(dataset.resolve_dataset(run, bucket).manifest)
    bucket.write_json(dataset.resolve_dataset(run, bucket).manifest, source)
    message = (
        rf"the scores are of content {found.content}, but dataset .* Delete "
        rf"s3://.*/scores/{found.id} to have it scored again"
    )
    with pytest.raises(Permanent, match=f"manifest.json: {message}"):
        run_rescore(spec, scorer)
    (changed,) = scores.resolve_all_scores(run, bucket, dataset.load_dataset(run, bucket))
    with pytest.raises(Permanent, match=message):
        scores.load_scores(changed, bucket)
    bucket.delete(found.manifest)
    with pytest.raises(Permanent, match=f"origin.json: {message}"):
        run_rescore(spec, scorer)


def test_an_empty_subset_is_an_error(spec: dict[str, Any], scorer: Remote) -> None:
    spec["spec"]["stages"][1]["subset"] = {"exercises": ["cocking"]}
    with pytest.raises(
        Permanent, match=r"subset: no document is picked. .*/datasets/[0-9a-f]+/manifest.json has the names"
    ):
        run_rescore(spec, scorer)


class SureTeacher:
    """Finds every token as likely as every other. The tests that need a real teacher have one; here the
    files of the parts matter, not what is in them."""

    max_length = 10**6

    def score(
        self, sequences: Iterable[NDArray[np.int32]], check_stop: Callable[[], None]
    ) -> Iterator[NDArray[np.float32]]:
        for ids_T in sequences:
            yield np.full(len(ids_T), -0.5, np.float32)


def test_a_part_without_training_documents_has_no_files_and_megatron_reads_all_others(
    spec: dict[str, Any], bucket: Bucket, encoders: EncoderPool, tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rows = pq.read_table(sample.write(tmp_path, shards=1)[0])
    for name in ("synth_001b", "synth_999"):
        pq.write_table(rows.slice(0, 0), tmp_path / name)
        bucket.put_file(f"input/{name}.parquet", tmp_path / name, {})
    spec["metadata"]["name"] = "sparse"
    spec["spec"]["stages"][1]["subset"] = {"fraction": 1.0, "prefer": "none"}
    run = DistillRun.parse(spec)
    preprocess(run, bucket, provenance(run, "preprocess"), threading.Event(), ProgressBoard(), None, encoders)
    written = run_for_manifest(spec, cast(Remote, SureTeacher()))
    assert written.facts["parts"] == 5
    stems = {name.partition(".")[0] for name in written.subjects}
    assert stems == {f"train/part-{part:05d}" for part in (0, 2, 3)}
    for stem in stems:
        for kind in ("bin", "idx"):
            bucket.download(written.subjects[f"{stem}.logp.{kind}"], tmp_path / f"logp.{kind}")
        assert len(IndexedDataset(str(tmp_path / "logp"))) > 0
    source = dataset.load_dataset(run, bucket)
    cache = BlockCache(bucket, tmp_path / "blocks")
    with closing(DatasetReader(source, "train", cache)) as documents:
        scored = ScoredDocuments(documents, written, cache)
        assert sum(map(len, scored.lengths)) == written.facts["documents"] > 0


def test_a_missing_dataset_is_an_error(spec: dict[str, Any], bucket: Bucket) -> None:
    bucket.delete(dataset.resolve_dataset(DistillRun.parse(spec), bucket).manifest)
    with pytest.raises(
        Permanent, match=r"the run's dataset is not built yet. Run python -m jobs.preprocess first"
    ):
        run_rescore(spec, None)


def test_a_teacher_whose_score_is_nan_is_rejected(
    spec: dict[str, Any], scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that overflow. The score is injected: no small real model overflows at one position of one
    document."""
    score_batches = scorer.score
    monkeypatch.setattr(
        scorer,
        "score",
        lambda *arguments: (
            np.where(np.arange(len(p)) == len(p) - 3, np.nan, p) for p in score_batches(*arguments)
        ),
    )
    with pytest.raises(
        Permanent,
        match=(
            r"teacher.model: document \d+ of training part 0 \(.*\): the teacher gave 1 of "
            r"its tokens no prob"
        ),
    ):
        run_rescore(spec, scorer)


def test_a_teacher_whose_scores_are_uniform_is_rejected(spec: dict[str, Any], bucket: Bucket) -> None:
    """As without an output matrix. No part is stored."""
    with pytest.raises(Permanent, match=r"^teacher.model: training part 0: all \d+ tokens .* is uniform"):
        run_rescore(spec, UniformTeacher())
    assert not [found.key for found in bucket.list("scores/") if "part-" in found.key]


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
def test_each_log_probability_has_one_float16_representation(value: float, bits: int) -> None:
    assert to_float16(np.array([value], np.float32)).view(np.uint16).tolist() == [bits]
    assert np.array([0xD640], np.uint16).view(np.float16)[0] == MIN_LOGP


def test_the_job_stops_on_sigterm_resumes_when_restarted_and_reuses_finished_scores(
    spec: dict[str, Any],
    bucket: Bucket,
    scorer: Remote,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first and the last attempt run as in a pod: with their own vLLM, or without one if nothing is left
    to score. The attempt in between uses the shared teacher."""
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
    wait_while_running(lambda: bool(scores.done_parts(found, bucket)), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert json.loads((tmp_path / "end").read_text())["class"] == "Terminated"
    finished = scores.done_parts(found, bucket)
    assert 1 <= len(finished) < 3
    assert not list(tmp_path.glob("vpmoe-scores-*")), "the files of unfinished parts are deleted"
    caplog.set_level("INFO")
    run_rescore(spec, scorer)
    assert bucket.exists(found.manifest) and "Scored part" in caplog.text
    assert f"Scored part {min(finished)}:" not in caplog.text, "a finished part is not scored again"
    process = start()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Reused" in output and "Loading the teacher" not in output
    assert progress(spec, bucket)["message"] == "Reused"
