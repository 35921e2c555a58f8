"""Preprocessing on a real S3 store: the same bytes for any number of workers and processes and after any
failure, every row counted, no partial output."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from openai_harmony import HarmonyEncodingName, load_harmony_encoding

from demo import sample
from tests.fakes.conversations import harmony_ids
from tests.fakes.store import S3
from vpmoe.api import DistillRun
from vpmoe.api.storage import StorageSpec
from vpmoe.data import dataset, vocabulary, vocabulary_file
from vpmoe.data.harmony import Renderer, SystemMessage, user_text
from vpmoe.data.index import read_index
from vpmoe.data.preprocess import filters, sampling, step
from vpmoe.data.preprocess.encode import EncoderPool
from vpmoe.data.spans import spans_of_documents
from vpmoe.data.tokenizer import tokenizer
from vpmoe.data.vocabulary import END_OF_DOCUMENT
from vpmoe.failure import Permanent, Terminated
from vpmoe.process.board import ProgressBoard
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.client import connect
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.retries import JOB

ROOT = Path(__file__).parents[3]
ONE_PROCESS: EncoderPool
THREE_PROCESSES: EncoderPool


@pytest.fixture
def spec(run_spec: dict[str, Any], sample_parquet: list[Path]) -> dict[str, Any]:
    """A run whose source is the sample, in this test's bucket."""
    bucket = open_bucket(run_spec)
    for path in sample_parquet:
        bucket.put_file(f"input/{path.name}", path, {})
    run_spec["spec"]["dataset"]["sampling"] = {"nonEnglishMax": 0.6}
    return run_spec


def open_bucket(spec: dict[str, Any]) -> Bucket:
    return Bucket.open(DistillRun.parse(spec).spec.storage)


def with_prefix(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """The same run and dataset with another prefix of the bucket, where the dataset does not exist yet."""
    changed: dict[str, Any] = json.loads(json.dumps(spec))
    changed["spec"]["storage"]["prefix"] = folder
    return changed


@pytest.fixture(scope="module", autouse=True)
def encoders() -> Iterator[None]:
    """Encoding processes for all tests of this module: loading the vocabulary takes longer than the
    sample."""
    global ONE_PROCESS, THREE_PROCESSES
    with EncoderPool(1) as ONE_PROCESS, EncoderPool(3) as THREE_PROCESSES:
        yield


@pytest.fixture(scope="module", autouse=True)
def client(s3: S3) -> Iterator[None]:
    """One client of the store for all tests of this module: to create one takes longer than most steps."""
    with pytest.MonkeyPatch.context() as changed:
        shared = connect(StorageSpec(endpoint=s3.endpoint, bucket="none"), JOB)
        changed.setattr("vpmoe.storage.bucket.connect", lambda spec, patience: shared)
        yield


def preprocess(
    spec: dict[str, Any],
    worker: int | None = None,
    stopping: threading.Event | None = None,
    encoders: EncoderPool | None = None,
    board: ProgressBoard | None = None,
) -> tuple[Bucket, DistillRun]:
    """Preprocess in this process; return the bucket and the run."""
    run = DistillRun.parse(spec)
    bucket = Bucket.open(run.spec.storage)
    provenance = Provenance(
        None,
        None,
        run.config_hash,
        "default",
        run.metadata.name,
        run.uid8,
        "preprocess",
        1,
        "2026-01-01T00:00:00Z",
    )
    step.preprocess(
        run,
        bucket,
        provenance,
        stopping or threading.Event(),
        board or ProgressBoard(),
        worker,
        encoders or ONE_PROCESS,
    )
    return bucket, run


def load_manifest(bucket: Bucket, run: DistillRun) -> Manifest:
    return manifest.load(bucket, dataset.resolve_dataset(run, bucket).manifest)


def sha256_by_name(found: Manifest) -> dict[str, str]:
    return {name: subject.sha256 for name, subject in found.subjects.items()}


def load_progress(bucket: Bucket, run: DistillRun) -> dict[str, Any]:
    report: dict[str, Any] = bucket.get_json(paths.progress(run, "preprocess"))
    return report


def load_documents(
    bucket: Bucket, found: Manifest, split: str, folder: Path
) -> dict[str, tuple[list[int], list[int]]]:
    """Ids and spans of every document of a split, by synth_id, from the bucket."""
    read: dict[str, tuple[list[int], list[int]]] = {}
    for part in range(found.facts["parts"]):
        stem = f"{split}/part-{part:05d}"
        if not any(name.startswith(f"{stem}.") for name in found.subjects):
            continue
        files = {}
        for name in ("tokens.bin", "tokens.idx", "spans.bin", "spans.idx", "documents.parquet"):
            files[name] = folder / f"{split}-{part}.{name}"
            bucket.download(found.subjects[f"{stem}.{name}"], files[name])
        index, span_index = read_index(files["tokens.idx"]), read_index(files["spans.idx"])
        assert index.lengths.tolist() == span_index.lengths.tolist()
        tokens = np.fromfile(files["tokens.bin"], np.int32)
        span_T = np.fromfile(files["spans.bin"], np.uint8)
        table = pq.read_table(files["documents.parquet"]).to_pylist()
        assert [row["tokens"] for row in table] == index.lengths.tolist()
        for row, offset, length in zip(table, index.offsets, index.lengths, strict=True):
            start = offset // 4
            span = span_T[start : start + length]
            assert (int((span == 1).sum()), int((span == 2).sum())) == (row["reasoning"], row["final"])
            read[row["synth_id"]] = (tokens[start : start + length].tolist(), span.tolist())
    return read


def test_every_kept_row_is_in_its_split_with_the_right_tokens(spec: dict[str, Any], tmp_path: Path) -> None:
    bucket, run = preprocess(spec)
    found = load_manifest(bucket, run)
    conversation = run.spec.dataset.conversation
    renderer = Renderer(
        tokenizer(),
        SystemMessage(
            conversation.identity, conversation.knowledge_cutoff, conversation.date, conversation.effort
        ),
    )
    dropped: dict[str, int] = {}
    wanted: dict[str, dict[str, tuple[list[int], list[int]]]] = {"train": {}, "valid": {}}
    for row in sample.rows():
        reason: str | None = filters.quality(row["synthetic_answer"], row["constraints"])
        document = renderer.render(
            row["query"], row["query_seed_text"], row["synthetic_reasoning"], row["synthetic_answer"]
        )
        if reason is None and len(document.ids) > run.spec.dataset.max_length:
            reason = "tooLong"
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        split = "valid" if sampling.is_valid(row["synth_id"], run.spec.dataset.valid_fraction) else "train"
        lengths = np.array([[document.prompt, document.reasoning, document.final]])
        wanted[split][row["synth_id"]] = (document.ids.tolist(), spans_of_documents(lengths).tolist())
    got = {split: load_documents(bucket, found, split, tmp_path) for split in wanted}
    assert got == wanted
    assert len(got["valid"]) > 3
    facts = found.facts
    assert facts["dropped"] == dropped
    assert facts["rows"] == 72 == facts["documents"] + sum(dropped.values())
    assert facts["tokens"] == sum(len(ids) for split in got.values() for ids, _ in split.values())
    assert facts["reasoning"] == sum(span.count(1) for split in got.values() for _, span in split.values())
    assert facts["splits"]["valid"]["documents"] == len(got["valid"])
    assert facts["languages"]["la"]["documents"] == 5
    assert facts["languages"]["unknown"]["documents"] == facts["exercises"]["unknown"]["documents"] + 1 == 2
    assert facts["tokenizer"] == {"id": "o200k_harmony", "sha256": vocabulary.VOCABULARY_SHA256}
    assert facts["settings"]["conversation"]["date"] == "2026-01-01"
    assert found.inputs[f"s3://{bucket.name}/input/synth_002.parquet"].facts["size"] > 0
    assert load_progress(bucket, run)["state"] == "Succeeded"
    assert load_progress(bucket, run)["parts"] == {"done": 3, "total": 3}
    assert load_progress(bucket, run)["dataset"]["sha256"] == found.sha256


def test_each_document_says_the_effort_that_is_drawn_for_its_id(spec: dict[str, Any], tmp_path: Path) -> None:
    """Compared with openai-harmony, and the same for each row wherever it is in the input."""
    spec["spec"]["dataset"]["conversation"] = {"effort": "low=0.3,medium=0.4,high=0.3"}
    bucket, run = preprocess(spec)
    found, conversation = load_manifest(bucket, run), run.spec.dataset.conversation
    said = conversation.identity, conversation.knowledge_cutoff, conversation.date
    rows = {row["synth_id"]: row for row in sample.rows()}
    encoding, counts = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS), Counter[str]()
    efforts = efforts_by_id(bucket, found)
    for split in ("train", "valid"):
        for synth_id, (ids, _) in load_documents(bucket, found, split, tmp_path).items():
            effort, row = efforts[synth_id], rows[synth_id]
            user = {"role": "user", "content": user_text(row["query"], row["query_seed_text"])}
            answer = {"role": "assistant", "content": row["synthetic_answer"]}
            if (row["synthetic_reasoning"] or "").strip():
                answer["reasoning_content"] = row["synthetic_reasoning"]
            system = SystemMessage(*said, effort)
            expected = harmony_ids(encoding, [user, answer], system=system, answer=False)
            assert ids == [*expected, END_OF_DOCUMENT]
            assert effort == sampling.draw_effort(synth_id, conversation.effort)
            counts[effort] += 1
    assert {name: count["documents"] for name, count in found.facts["efforts"].items()} == counts
    assert set(counts) == {"low", "medium", "high"} and counts.total() == found.facts["documents"]
    assert sum(count["tokens"] for count in found.facts["efforts"].values()) == found.facts["tokens"]
    assert found.facts["settings"]["conversation"]["effort"] == conversation.effort

    moved = with_prefix(spec, "moved")
    moved["spec"]["dataset"]["source"] = moved["spec"]["dataset"]["source"].replace("input", "moved-input")
    put_rows(spec, tmp_path, "moved-input/all.parquet", sample.rows()[::-1])
    elsewhere = preprocess(moved)
    assert efforts_by_id(elsewhere[0], load_manifest(*elsewhere)) == efforts


def efforts_by_id(bucket: Bucket, found: Manifest) -> dict[str, str]:
    """The effort of every document of both splits, by synth_id, from documents.parquet."""
    efforts = {}
    for name, subject in found.subjects.items():
        if name.endswith(".documents.parquet"):
            table = pq.read_table(pa.BufferReader(b"".join(bucket.blocks(subject))))
            efforts |= dict(zip(table["synth_id"].to_pylist(), table["effort"].to_pylist(), strict=True))
    return efforts


def test_workers_and_processes_do_not_change_a_byte(spec: dict[str, Any]) -> None:
    alone = preprocess(with_prefix(spec, "alone"), encoders=THREE_PROCESSES)
    spec["spec"]["dataset"]["workers"] = 2
    for worker in (1, 0):
        two = preprocess(with_prefix(spec, "two"), worker)
    spec["spec"]["dataset"]["workers"] = 7
    threads = [
        threading.Thread(target=preprocess, args=(with_prefix(spec, "seven"), worker))
        for worker in (6, 1, 0, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seven = (open_bucket(with_prefix(spec, "seven")), DistillRun.parse(with_prefix(spec, "seven")))
    expected = sha256_by_name(load_manifest(*alone))
    assert len(expected) == 30
    assert sha256_by_name(load_manifest(*two)) == expected
    assert sha256_by_name(load_manifest(*seven)) == expected
    assert load_progress(*two)["state"] == load_progress(*seven)["state"] == "Succeeded"


def test_a_finished_dataset_is_reused(spec: dict[str, Any]) -> None:
    first = preprocess(spec)
    before = load_manifest(*first).sha256
    spec["metadata"]["name"] = "another-run"
    spec["spec"]["dataset"]["workers"] = 5
    second = preprocess(spec, worker=3)
    assert load_manifest(*second).sha256 == before
    assert load_progress(*second)["message"] == "Reused"
    assert load_progress(*second)["dataset"] == load_progress(*first)["dataset"]


def test_input_added_later_does_not_change_a_started_run(
    spec: dict[str, Any], sample_parquet: list[Path]
) -> None:
    bucket, run = preprocess(spec)
    bucket.put_file("input/synth_000.parquet", sample_parquet[0], {})
    assert len(dataset.resolve_dataset(run, bucket).inputs.shards) == 3
    spec["metadata"]["name"] = "later"
    assert len(dataset.resolve_dataset(DistillRun.parse(spec), bucket).inputs.shards) == 4
    assert (
        dataset.resolve_dataset(DistillRun.parse(spec), bucket).id != dataset.resolve_dataset(run, bucket).id
    )


def test_a_run_started_by_another_writer_version_is_rejected(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = DistillRun.parse(spec)
    dataset_before = dataset.resolve_dataset(run, open_bucket(spec)).id
    monkeypatch.setattr(dataset, "WRITER", dataset.WRITER + 1)
    with pytest.raises(
        Permanent, match=f"the run began dataset {dataset_before}, but this code builds dataset"
    ):
        preprocess(spec)


def start_job(spec: dict[str, Any], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the step as a user does, in another process."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.preprocess", "--run", str(path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_a_killed_worker_resumes_at_its_first_missing_part(spec: dict[str, Any], tmp_path: Path) -> None:
    uninterrupted = preprocess(with_prefix(spec, "undisturbed"))
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    killed = with_prefix(spec, "killed")
    bucket, run = open_bucket(killed), DistillRun.parse(killed)
    found = dataset.resolve_dataset(run, bucket)
    parts = rng.randrange(3)
    process = start_job(killed, tmp_path)
    try:
        wait_for(
            lambda: (
                len(dataset.completed_parts(found, bucket)) >= parts
                and bucket.exists(paths.census(found.id, 2))
            ),
            process,
        )
        time.sleep(rng.uniform(0, 0.2))
        children = children_of(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 20
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if alive(child)], "encoding processes outlive the worker"
    completed = dataset.completed_parts(found, bucket)
    record = {part: bucket.head(paths.part_record(found.id, part)).etag for part in completed}
    if bucket.exists(found.manifest):
        bucket.delete(found.manifest)  # killed after its last write: undo it
    resumed = preprocess(killed)
    assert sha256_by_name(load_manifest(*resumed)) == sha256_by_name(load_manifest(*uninterrupted))
    assert {part: bucket.head(paths.part_record(found.id, part)).etag for part in completed} == record


def children_of(pid: int) -> list[int]:
    """All descendants of process `pid`."""
    found, queue = [], [pid]
    while queue:
        tasks = Path(f"/proc/{queue.pop()}/task")
        listed = [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
        found += listed
        queue += listed
    return found


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stopped_worker_reports_it_and_leaves_no_partial_part(spec: dict[str, Any]) -> None:
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(Terminated, match="the parts that are done are in the bucket"):
        preprocess(spec, stopping=stopping)
    bucket, run = open_bucket(spec), DistillRun.parse(spec)
    assert not list(bucket.list(f"{dataset.resolve_dataset(run, bucket).folder}/parts/"))


def test_a_full_disk_is_reported_and_leaves_no_part(spec: dict[str, Any], tmp_path: Path) -> None:
    """A file size limit causes the same OSError in the same write as a full disk."""
    vocabulary_file.install(tmp_path / f"vpmoe-vocabulary-{os.getuid()}")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    completed = subprocess.run(
        [sys.executable, "-m", "jobs.preprocess", "--run", str(tmp_path / "run.yaml")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "VPMOE_TERMINATION_LOG": str(tmp_path / "end")},
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert completed.returncode == 75, completed.stderr
    assert (
        "File too large. A part needs about three times"
        in json.loads((tmp_path / "end").read_text())["message"]
    )
    bucket, run = open_bucket(spec), DistillRun.parse(spec)
    folder = dataset.resolve_dataset(run, bucket).folder
    assert not [found.key for found in bucket.list(folder) if "/census/" not in found.key]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("vpmoe-part-")]


def put_shard_with_bad_rows(spec: dict[str, Any], folder: Path, bad: int, rows: int = 600) -> None:
    """Add a shard with `bad` rows that are not UTF-8 and one row with a surrogate."""
    answers = [f"answer {row}".encode() for row in range(rows)]
    for row in range(bad):
        answers[row * 3 + 17] = b"torn \xe2\x86"
    answers[5] = b"lone \xed\xa0\x80"
    raw = pa.array(answers, pa.binary())
    column = pa.StringArray.from_buffers(rows, raw.buffers()[1], raw.buffers()[2])
    plain = {
        name: [f"{name} {row}" for row in range(rows)]
        for name in ("synth_id", "query", "synthetic_reasoning")
    }
    pq.write_table(
        pa.table({**plain, "synthetic_answer": column}), folder / "bad.parquet", row_group_size=100
    )
    open_bucket(spec).put_file("input/synth_bad.parquet", folder / "bad.parquet", {})


def test_an_unreadable_row_is_named_and_the_others_are_kept(
    spec: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_shard_with_bad_rows(spec, tmp_path, bad=6)
    bucket, run = preprocess(spec)
    facts = load_manifest(bucket, run).facts
    assert facts["unreadable"]["rows"] == 6
    assert facts["unreadable"]["first"][0] == {
        "file": f"s3://{bucket.name}/input/synth_bad.parquet",
        "rows": [17, 18],
        "why": "synthetic_answer is not UTF-8: byte 5 of 7 is 0xe2",
    }
    assert facts["surrogates"] == 1
    assert facts["rows"] == 672 == facts["documents"] + 6 + sum(facts["dropped"].values())
    assert "input/synth_bad.parquet: rows [17, 18) (from 0) cannot be read" in caplog.text


def test_a_record_is_the_same_for_any_number_of_processes(spec: dict[str, Any], tmp_path: Path) -> None:
    """Also if a damaged row group is found while earlier rows, some of them unreadable, are being encoded."""
    put_shard_with_bad_rows(spec, tmp_path, bad=4)
    path = tmp_path / "bad.parquet"
    column = pq.read_metadata(path).row_group(5).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 16] = b"\xff" * 16
    path.write_bytes(data)
    open_bucket(spec).put_file("input/synth_bad.parquet", path, {})
    spec["spec"]["dataset"]["unreadableMax"] = 0.5
    records = []
    for encoders in (ONE_PROCESS, THREE_PROCESSES):
        changed = with_prefix(spec, f"with-{encoders.processes}")
        bucket, run = preprocess(changed, encoders=encoders)
        records.append(bucket.get(paths.part_record(dataset.resolve_dataset(run, bucket).id, 3)))
    assert records[0] == records[1]
    assert [found[:2] for found in json.loads(records[0])["unreadable"]["first"]] == [
        [17, 18],
        [20, 21],
        [23, 24],
        [26, 27],
        [500, 600],
    ]


def put_rows(spec: dict[str, Any], folder: Path, key: str, rows: list[dict[str, Any]]) -> None:
    """Add a shard of these rows, whose other columns have defaults."""
    defaults: dict[str, Any] = dict.fromkeys(sample.COLUMNS) | {"query": "q", "synthetic_answer": "a"}
    table = pa.Table.from_pylist([defaults | row for row in rows], schema=sample.SCHEMA)
    pq.write_table(table, folder / "rows.parquet")
    open_bucket(spec).put_file(key, folder / "rows.parquet", {})


def test_duplicates_empty_queries_and_contradictions_are_in_the_manifest_and_the_last_line(
    run_spec: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two files with the same base name: rows without an id do not collide, all else counts across files."""
    run_spec["spec"]["dataset"]["source"] = run_spec["spec"]["dataset"]["source"].replace("*", "**/*")
    run_spec["spec"]["dataset"]["validFraction"] = 0.0
    wrong = {"constraints": "result: 42", "synthetic_answer": "41\n" + "x" * 500}
    put_rows(
        run_spec,
        tmp_path,
        "input/en/part.parquet",
        [
            {"synth_id": "twice", "query": "one"},
            {"synth_id": "twice", "query": "two"},
            {"synth_id": None, "query": "three"},
            {"synth_id": "c", "query": ""},
            {"synth_id": "gone", "query": None},
            *({"synth_id": f"wrong {number}" + "y" * 500, **wrong} for number in range(2)),
        ],
    )
    put_rows(
        run_spec,
        tmp_path,
        "input/fr/part.parquet",
        [
            {"synth_id": "twice", "query": "one", "language": " "},
            {"synth_id": "d", "query": "three", "language": ""},
            {"synth_id": None, "query": "four", "exercise": "\u3000"},
            {"synth_id": " ", "query": " \n", "exercise": " rag "},
            *({"synth_id": f"wrong {number}", **wrong} for number in range(2, 4)),
        ],
    )
    with caplog.at_level("INFO"):
        bucket, run = preprocess(run_spec)
    found = load_manifest(bucket, run)
    assert found.facts["duplicates"] == {"ids": 2, "queries": 2}
    assert found.facts["emptyQueries"] == 2
    assert found.facts["dropped"] == {"contradictedResult": 4}
    folder = f"s3://{bucket.name}/{bucket.prefix}input"
    assert found.facts["contradictions"] == [
        {
            "file": f"{folder}/{file}/part.parquet",
            "row": row,
            "id": (f"wrong {number}" + "y" * 500 * (number < 2))[:100],
            "result": "42",
            "answer": "41",
        }
        for number, (file, row) in enumerate([("en", 5), ("en", 6), ("fr", 4)])
    ]
    assert {name: one["documents"] for name, one in found.facts["languages"].items()} == {"unknown": 8}
    assert {name: one["documents"] for name, one in found.facts["exercises"].items()} == {
        "rag": 1,
        "unknown": 7,
    }
    ids = load_documents(bucket, found, "train", tmp_path)
    keys = [f"{bucket.prefix}input/{place}" for place in ("en/part.parquet#2", "fr/part.parquet#2")]
    assert set(ids) == {"twice", "c", "d", *keys, f"{bucket.prefix}input/fr/part.parquet#3"}
    tables = [pq.read_table(tmp_path / f"train-{part}.documents.parquet") for part in range(2)]
    labels = pa.concat_tables(tables).select(["language", "exercise"]).to_pylist()
    assert {tuple(label.values()) for label in labels} == {(None, None), (None, "rag")}
    last = [record.getMessage() for record in caplog.records if record.name.startswith("vpmoe")][-1]
    for part in (
        "8 documents of 13 rows",
        "unreadable rows: 1;",
        "4 contradictedResult",
        "duplicates: 2 ids, 2 queries",
        "empty queries: 2",
    ):
        assert part in last
    assert load_progress(bucket, run)["message"] == "Complete; unreadable rows: 1"


def test_more_unreadable_rows_than_allowed_stop_the_step(spec: dict[str, Any], tmp_path: Path) -> None:
    put_shard_with_bad_rows(spec, tmp_path, bad=7)
    with pytest.raises(
        Permanent,
        match=r"7 rows cannot be read .*synth_bad.parquet.* "
        r"more than the 6 that dataset.unreadableMax allows",
    ):
        preprocess(spec)
    spec["spec"]["dataset"]["unreadableMax"] = 0.02
    spec["metadata"]["name"] = "lenient"
    assert load_manifest(*preprocess(spec)).facts["unreadable"]["rows"] == 7


def test_of_a_damaged_row_group_the_last_row_is_named(
    spec: dict[str, Any], sample_parquet: list[Path]
) -> None:
    open_bucket(spec).put_bytes("input/synth_bad.parquet", sample_shard(sample_parquet, "rows"), {})
    rows = pq.read_metadata(sample_parquet[1]).num_rows
    with pytest.raises(
        Permanent,
        match=rf"synth_bad.parquet, the last of them row {rows - 1}, from 0: row group 0 is damaged",
    ):
        preprocess(spec)


def sample_shard(sample_parquet: list[Path], damage: str) -> bytes:
    """The sample's second shard, damaged."""
    path = sample_parquet[1]
    data = path.read_bytes()
    if damage == "cut":
        return data[:-100]
    if damage == "column":
        file = io.BytesIO()
        pq.write_table(pq.read_table(path).drop_columns(["synthetic_answer"]), file)
        return file.getvalue()
    if damage == "type":
        file = io.BytesIO()
        table = pq.read_table(path)
        pq.write_table(table.set_column(0, "synth_id", pa.array(range(len(table)))), file)
        return file.getvalue()
    if damage == "rows":
        changed = bytearray(data)
        column = pq.read_metadata(path).row_group(0).column(sample.SCHEMA.get_field_index("synthetic_answer"))
        start = column.dictionary_page_offset or column.data_page_offset
        changed[start : start + 16] = b"\xff" * 16
        return bytes(changed)
    return b""


@pytest.mark.parametrize("repair", ["rewritten", "removed"])
@pytest.mark.parametrize("damage", ["cut", "column", "type", "rows", "empty"])
def test_a_run_goes_on_when_its_input_is_repaired(
    spec: dict[str, Any], sample_parquet: list[Path], damage: str, repair: str
) -> None:
    """Also if other parts were done: damaged rows are found only when their part is made."""
    bucket, key = open_bucket(spec), f"input/{sample_parquet[1].name}"
    bucket.put_bytes(key, sample_shard(sample_parquet, damage), {})
    spec["spec"]["dataset"]["workers"] = 3
    run = DistillRun.parse(spec)
    before = dataset.resolve_dataset(run, bucket)
    if damage == "rows":
        preprocess(spec, worker=0)
    for _ in range(2):  # the second attempt finds the file as it was
        with pytest.raises(Permanent, match=r"it then lists dataset.source again") as error:
            preprocess(spec)
        assert bucket.url(key) in str(error.value)
        assert not bucket.exists(paths.inputs(run))
    done = dataset.completed_parts(before, bucket)
    assert done == ({0} if damage == "rows" else set())
    if repair == "removed":
        bucket.delete(key)
    else:
        bucket.put_file(key, sample_parquet[1], {})
    repaired = load_manifest(*preprocess(spec))
    assert repaired.facts["rows"] == (48 if repair == "removed" else 72)
    assert dataset.resolve_dataset(run, bucket).id != before.id
    clean = load_manifest(*preprocess(with_prefix(spec, "clean")))
    assert sha256_by_name(repaired) == sha256_by_name(clean)


def test_a_worker_with_other_input_does_not_release_that_of_the_run(
    spec: dict[str, Any], sample_parquet: list[Path]
) -> None:
    bucket, run = open_bucket(spec), DistillRun.parse(spec)
    old = dataset.resolve_dataset(run, bucket)
    bucket.delete(paths.inputs(run))
    bucket.put_file("input/synth_000.parquet", sample_parquet[0], {})
    new = dataset.resolve_dataset(run, bucket)
    dataset.release_inputs(run, bucket, old)
    assert bucket.exists(paths.inputs(run))
    dataset.release_inputs(run, bucket, new)
    assert not bucket.exists(paths.inputs(run))


def test_the_columns_of_all_files_are_checked_before_a_part_is_made(
    spec: dict[str, Any], sample_parquet: list[Path]
) -> None:
    """By each worker, also by those whose own files are right."""
    bucket = open_bucket(spec)
    bucket.put_bytes("input/synth_999.parquet", sample_shard(sample_parquet, "column"), {})
    spec["spec"]["dataset"]["workers"] = 2
    for worker in (0, 1, None):
        with pytest.raises(Permanent, match=r"synth_999.parquet: no column synthetic_answer"):
            preprocess(spec, worker=worker)
    folder = dataset.resolve_dataset(DistillRun.parse(spec), bucket).folder
    assert {found.key.split("/")[2] for found in bucket.list(f"{folder}/")} == {"census"}


def test_files_without_a_column_that_others_have_are_logged(
    spec: dict[str, Any], sample_parquet: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = io.BytesIO()
    pq.write_table(pq.read_table(sample_parquet[1]).drop_columns(["constraints", "language"]), file)
    open_bucket(spec).put_bytes(f"input/{sample_parquet[1].name}", file.getvalue(), {})
    preprocess(spec)
    for name in ("constraints", "language"):
        assert f"1 of 3 files have no column {name}: it is null in all their rows" in caplog.text


def check_that_megatron_reads_every_part(found: Manifest, bucket: Bucket, folder: Path) -> set[str]:
    """Open all parts with Megatron's own reader, as its GPTDataset does: memory-mapped, and by pread. Returns
    what precedes the parts' file names."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for name, subject in found.subjects.items():
        (folder / name).parent.mkdir(exist_ok=True)
        bucket.download(subject, folder / name)
    stems = {name.partition(".")[0] for name in found.subjects}
    for stem, kind in ((stem, kind) for stem in stems for kind in ("tokens", "spans")):
        rows = pq.read_table(folder / f"{stem}.documents.parquet").to_pylist()
        for mmap in (True, False):
            opened = IndexedDataset(str(folder / f"{stem}.{kind}"), mmap=mmap)
            assert [len(opened[document]) for document in range(len(opened))] == [
                row["tokens"] for row in rows
            ]
    return stems


@pytest.mark.parametrize(
    "fraction, empty",
    [
        pytest.param(0.0, "valid", id="nothing held out"),
        pytest.param(1e-9, "valid", id="too small for the rows"),
        pytest.param(0.9999999, "train", id="everything held out"),
    ],
)
def test_a_split_without_documents_has_no_files(
    spec: dict[str, Any], tmp_path: Path, fraction: float, empty: str
) -> None:
    spec["spec"]["dataset"]["validFraction"] = fraction
    bucket, run = preprocess(spec)
    found = load_manifest(bucket, run)
    assert found.facts["splits"][empty]["documents"] == 0
    stems = check_that_megatron_reads_every_part(found, bucket, tmp_path)
    (full,) = {"train", "valid"} - {empty}
    assert stems == {f"{full}/part-{part:05d}" for part in range(3)}
    assert not list(bucket.list(f"datasets/{found.facts['id']}/{empty}/"))


def test_a_part_has_the_files_of_the_splits_that_it_has_documents_of(
    spec: dict[str, Any], tmp_path: Path, sample_parquet: list[Path]
) -> None:
    """Shards of few rows: one without any, one that is held out, one that is not, one whose rows are all
    dropped."""
    rows = pq.read_table(sample_parquet[0])
    held_out = pa.compute.is_in(
        rows["synth_id"],
        value_set=pa.array(
            [one for one in rows["synth_id"].to_pylist() if sampling.is_valid(one, 0.15)], pa.string()
        ),
    )
    bucket = open_bucket(spec)
    bucket.delete_prefix("input/")
    shards = {
        "0-both": rows,
        "1-none": rows.slice(0, 0),
        "2-valid": rows.filter(held_out),
        "3-train": rows.filter(pa.compute.invert(held_out)),
        "4-dropped": rows.set_column(
            rows.schema.get_field_index("synthetic_answer"),
            "synthetic_answer",
            pa.array([" "] * len(rows), pa.string()),
        ),
        "5-valid": rows.filter(held_out).slice(0, 1),
    }
    for name, table in shards.items():
        pq.write_table(table, tmp_path / name)
        bucket.put_file(f"input/{name}.parquet", tmp_path / name, {})
    spec["spec"]["dataset"]["sampling"] = {"memorizationMax": 1, "nonEnglishMax": 1}
    bucket, run = preprocess(spec)
    found = load_manifest(bucket, run)
    assert run.spec.dataset.valid_fraction == 0.15
    assert check_that_megatron_reads_every_part(found, bucket, tmp_path) == {
        f"{split}/part-{part:05d}"
        for split, parts in (("train", (0, 3)), ("valid", (0, 2, 5)))
        for part in parts
    }
    assert found.facts["parts"] == 6


def test_documents_are_shuffled_within_a_part(
    spec: dict[str, Any], tmp_path: Path, sample_parquet: list[Path]
) -> None:
    spec["spec"]["dataset"]["validFraction"] = 0.0
    bucket, run = preprocess(spec)
    written = list(load_documents(bucket, load_manifest(bucket, run), "train", tmp_path))[:20]
    input_order = [
        row["synth_id"] for row in pq.read_table(sample_parquet[0]).to_pylist() if row["synth_id"] in written
    ]
    assert written != input_order
    assert len(set(written) & set(input_order)) == len(written)


def test_dropping_all_rows_is_an_error(spec: dict[str, Any]) -> None:
    spec["spec"]["dataset"]["maxLength"] = 16
    with pytest.raises(Permanent, match=r"all 72 rows were dropped: .*tooLong"):
        preprocess(spec)


def test_preprocessing_does_not_import_torch() -> None:
    """Not even to read rows: the datasets library would import torch when it streams."""
    code = (
        "import sys, jobs.preprocess, vpmoe.data.preprocess.step, vpmoe.data.hub, demo.sample, pathlib, "
        "tempfile\n"
        "from vpmoe.data.inputs import InputShard; from vpmoe.data.preprocess import rows\n"
        "path = demo.sample.write(pathlib.Path(tempfile.mkdtemp()))[0]\n"
        "class Local:\n"
        "    def other(self, name, field): return self\n"
        "    def fetch_range(self, wanted, start, stop): return path.read_bytes()[start:stop]\n"
        "reader = rows.ShardReader(InputShard('s3://b/k', path.stat().st_size, ''), Local(), rows.METADATA)\n"
        "assert sum(batch.columns.num_rows for batch in reader.batches(10)) == 24\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
