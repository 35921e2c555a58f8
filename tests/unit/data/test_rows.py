"""Rows of parquet files on a real S3 store: which are read, reported as unreadable or stop the step, and the
documents that are made of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo import sample
from tests.fakes import fake_hub
from vpmoe.api.dataset import Conversation
from vpmoe.data import vocabulary_file
from vpmoe.data.harmony import Renderer, SystemMessage
from vpmoe.data.inputs import InputShard, resolve_source
from vpmoe.data.preprocess import encode, text
from vpmoe.data.preprocess.encode import COLUMNS, PreprocessContext, make_chunk
from vpmoe.data.preprocess.filters import Contradiction
from vpmoe.data.preprocess.rows import RowBatch, ShardReader
from vpmoe.data.preprocess.sampling import BINS, Thresholds
from vpmoe.data.preprocess.text import UnreadableRows, decode_columns
from vpmoe.data.tokenizer import tokenizer
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, StorageError

ROOT = Path(__file__).parents[3]
SETTING = SystemMessage("You are vpMoE, a large language model.", "2024-06", "2026-01-01", "high")
CONVERSATION = Conversation()
CONTEXT = PreprocessContext("0" * 64, CONVERSATION, 400, 0.2, Thresholds((BINS,) * 4))


def strings(*values: bytes | None) -> pa.Array:
    """A column of strings that are not checked to be UTF-8."""
    raw = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])


def put_shard(bucket: Bucket, path: Path, key: str = "input/synth_001.parquet") -> InputShard:
    bucket.put_file(key, path, {})
    return next(shard for shard in resolve_source(bucket.url(key), bucket).shards if shard.url.endswith(key))


def write_numbered_rows(folder: Path, rows: int, group: int, **columns: Any) -> Path:
    """A file whose values are numbered by row, with page checksums, as newer writers add them."""
    table = {name: [f"{name} {row}" for row in range(rows)] for name in COLUMNS} | columns
    pq.write_table(
        pa.table(table),
        folder / "f.parquet",
        row_group_size=group,
        compression="snappy",
        write_page_checksum=True,
    )
    return folder / "f.parquet"


def test_every_row_is_in_one_batch_in_order(bucket: Bucket, tmp_path: Path) -> None:
    shard = put_shard(bucket, write_numbered_rows(tmp_path, 250, 100))
    reader = ShardReader(shard, bucket, COLUMNS)
    batches = list(reader.batches(64))
    assert reader.rows == 250
    assert all(isinstance(batch, RowBatch) for batch in batches)
    assert [(b.first, b.columns.num_rows) for b in batches] == [
        (0, 64),
        (64, 36),
        (100, 64),
        (164, 36),
        (200, 50),
    ]
    ids = [one for b in batches for one in decode_columns(b.columns, ["synth_id"]).columns["synth_id"]]
    assert ids == [f"synth_id {row}" for row in range(250)]


def test_concurrent_readers_read_their_own_shards(bucket: Bucket, tmp_path: Path) -> None:
    """The datasets library registers the opener of files globally, for all datasets of a process."""
    shards = []
    for name in ("a", "b", "c"):
        shards.append(
            put_shard(
                bucket,
                write_numbered_rows(tmp_path, 200, 100, query=[f"{name} {row}" for row in range(200)]),
                f"input/{name}.parquet",
            )
        )
    readers = [ShardReader(shard, bucket, COLUMNS).batches(50) for shard in shards]
    for batches in zip(*readers, strict=True):
        for name, batch in zip("abc", batches, strict=True):
            assert decode_columns(batch.columns, ["query"]).columns["query"] == [
                f"{name} {batch.first + row}" for row in range(50)
            ]


def test_only_the_requested_columns_are_fetched(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [os.urandom(500).hex() for _ in range(2000)]
    shard = put_shard(bucket, write_numbered_rows(tmp_path, 2000, 1000, synthetic_answer=long))
    fetched = []
    original = Bucket.fetch_range
    monkeypatch.setattr(
        Bucket,
        "fetch_range",
        lambda self, wanted, start, stop: (fetched.append(stop - start), original(self, wanted, start, stop))[
            1
        ],
    )
    assert (
        sum(
            batch.columns.num_rows
            for batch in ShardReader(shard, bucket, ("synth_id", "language")).batches(500)
        )
        == 2000
    )
    assert sum(fetched) < shard.size / 4


def test_only_the_rows_of_a_damaged_row_group_are_lost(bucket: Bucket, tmp_path: Path) -> None:
    path = write_numbered_rows(tmp_path, 400, 100)
    column = pq.read_metadata(path).row_group(2).column(5)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
    path.write_bytes(data)
    shard = put_shard(bucket, path)
    found = list(ShardReader(shard, bucket, COLUMNS).batches(64))
    bad = [one for one in found if isinstance(one, UnreadableRows)]
    assert [(one.first, one.stop) for one in bad] == [(200, 300)]
    assert "row group 2 is damaged" in bad[0].reason
    assert sum(one.columns.num_rows for one in found if isinstance(one, RowBatch)) == 300


@pytest.mark.parametrize(
    "content",
    [b"", b"not parquet at all", b"PAR1 and then nothing", b"\0" * 200_000],
    ids=["empty", "text", "torn", "zeros"],
)
def test_a_file_that_is_not_parquet_is_named(bucket: Bucket, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(Permanent, match=r"input/synth_001.parquet: not a parquet file"):
        ShardReader(put_shard(bucket, tmp_path / "f"), bucket, COLUMNS)


def test_a_missing_column_is_named_and_a_nullable_one_may_be_missing(bucket: Bucket, tmp_path: Path) -> None:
    table = pa.table(
        {
            "synth_id": ["a"],
            "query": ["q"],
            "synthetic_reasoning": ["r"],
            "synthetic_answer": ["a"],
            "language": pa.nulls(1),
        }
    )
    pq.write_table(table, tmp_path / "few.parquet")
    (batch,) = ShardReader(put_shard(bucket, tmp_path / "few.parquet"), bucket, COLUMNS).batches(64)
    texts = decode_columns(batch.columns, COLUMNS)
    assert texts.columns["language"] == texts.columns["constraints"] == texts.columns["exercise"] == [None]
    pq.write_table(table.drop_columns(["query", "synthetic_answer"]), tmp_path / "fewer.parquet")
    with pytest.raises(
        Permanent,
        match=r"b.parquet: no column query, synthetic_answer; "
        r"the file has synth_id, synthetic_reasoning, lang",
    ):
        ShardReader(put_shard(bucket, tmp_path / "fewer.parquet", "input/b.parquet"), bucket, COLUMNS)


def test_a_column_that_is_not_text_is_named(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(Permanent, match=r"column query has type int64, not text"):
        ShardReader(put_shard(bucket, write_numbered_rows(tmp_path, 3, 3, query=[1, 2, 3])), bucket, COLUMNS)


def test_a_file_without_rows_has_no_batches(bucket: Bucket, tmp_path: Path) -> None:
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in COLUMNS}), tmp_path / "none.parquet")
    assert list(ShardReader(put_shard(bucket, tmp_path / "none.parquet"), bucket, COLUMNS).batches(64)) == []


def test_an_object_that_was_replaced_after_it_was_listed_is_rejected(bucket: Bucket, tmp_path: Path) -> None:
    shard = put_shard(bucket, write_numbered_rows(tmp_path, 10, 10))
    put_shard(bucket, write_numbered_rows(tmp_path, 11, 10))
    with pytest.raises(StorageError, match="The input was changed since") as error:
        ShardReader(shard, bucket, COLUMNS)
    assert error.value.reason == "Altered"


def test_an_unreachable_store_is_not_reported_as_damage(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(put_shard(bucket, write_numbered_rows(tmp_path, 40_000, 10_000)), bucket, COLUMNS)

    def unreachable(*args: object) -> bytes:
        raise StorageError("the store is away", "Unreachable")

    monkeypatch.setattr(Bucket, "fetch_range", unreachable)
    with pytest.raises(StorageError, match="away"):
        list(reader.batches(64))


def test_a_source_that_matches_nothing_is_rejected(bucket: Bucket) -> None:
    with pytest.raises(
        Permanent, match=r"dataset.source: s3://.*/nothing/\*.parquet matches no parquet file"
    ):
        resolve_source(bucket.url("nothing/*.parquet"), bucket)


def test_shards_are_sorted_by_key(bucket: Bucket, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        put_shard(bucket, write_numbered_rows(tmp_path, 1, 1), f"input/{name}.parquet")
    (tmp_path / "x.txt").write_text("no parquet")
    bucket.put_file("input/readme.txt", tmp_path / "x.txt", {})
    assert [shard.key for shard in resolve_source(bucket.url("input/*.parquet"), bucket).shards] == [
        bucket.prefix + "input/a.parquet",
        bucket.prefix + "input/b.parquet",
        bucket.prefix + "input/c.parquet",
    ]


RESOLVE_ON_HUB = """
import sys
from vpmoe.data.preprocess import rows
from vpmoe.data.inputs import resolve_source
from vpmoe.data.preprocess.text import decode_columns
for source in sys.argv[1:]:
    try:
        inputs = resolve_source(source, None)
        print(inputs.commit, [(shard.url, shard.size) for shard in inputs.shards])
        for shard in inputs.shards:
            reader = rows.ShardReader(shard, None, rows.METADATA)
            decoded = (decode_columns(batch.columns, ["synth_id"]) for batch in reader.batches(10))
            print([name for rows_ in decoded for name in rows_.columns["synth_id"]])
    except Exception as error:
        print(type(error).__name__, error)
"""


def resolve_on_hub(endpoint: str, *sources: str) -> list[str]:
    """Of each source its shards, then the ids of each of them, up to the first error, which follows. Runs in
    another process, because the hub's client reads
    its endpoint when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE_ON_HUB, *sources],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": endpoint},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_dataset_of_the_hub_is_read_at_the_commit_of_its_revision(
    sample_parquet: list[Path],
) -> None:
    files = {
        "README.md": b"#",
        "synth_002.parquet": b"-",
        "synth_001.parquet": sample_parquet[0].read_bytes(),
    }
    with fake_hub.serve("PleIAs/SYNTH", files) as (endpoint, requested):
        listed, ids, _, newest, _, _, revision, name = resolve_on_hub(
            endpoint,
            "hf://PleIAs/SYNTH@main",
            "hf://PleIAs/SYNTH",
            "hf://PleIAs/SYNTH@v9",
            "hf://PleIAs/OTHER",
        )
    url = f"hf://datasets/PleIAs/SYNTH@{fake_hub.COMMIT}"
    assert (
        listed == f"{fake_hub.COMMIT} "
        f"{[(f'{url}/synth_001.parquet', len(files['synth_001.parquet'])), (f'{url}/synth_002.parquet', 1)]}"
    )
    assert newest == listed
    assert ids == str([row["synth_id"] for row in pq.read_table(sample_parquet[0]).to_pylist()])
    assert all(fake_hub.COMMIT in path for path in requested if "/resolve/" in path)
    assert revision.startswith(
        "Permanent dataset.source: hf://PleIAs/SYNTH@v9: the Hugging Face hub has no such dataset or revision"
    )
    assert name.startswith(
        "Permanent dataset.source: hf://PleIAs/OTHER: the Hugging Face hub has no such dataset or revision"
    )


def test_a_file_of_the_hub_is_read_by_its_exact_name(sample_parquet: list[Path], tmp_path: Path) -> None:
    """Each has rows of its own: as a pattern or a part of a URL, some names are those of other files."""
    names = (
        "data/[1].parquet",
        "data/1.parquet",
        "data/a@b c.parquet",
        "data/x::y.parquet",
        "data/w?x#y%20.parquet",
        "data/w",
        "data/*.parquet",
        "data/é🪨+{}.parquet",
    )
    table = pq.read_table(sample_parquet[0])
    files = {"data/1.parquet.old": b"", "README.md": b"#"}
    for number, name in enumerate(names):
        pq.write_table(table.slice(number, 1), tmp_path / "shard")
        files[name] = (tmp_path / "shard").read_bytes()
    with fake_hub.serve("owner/name", files) as (endpoint, _):
        _, *ids = resolve_on_hub(endpoint, "hf://owner/name")
    expected = {name: [table["synth_id"][number].as_py()] for number, name in enumerate(names)}
    assert ids == [str(expected[name]) for name in sorted(names) if name.endswith(".parquet")]


def test_an_unreachable_hub_is_reported_with_the_remedy() -> None:
    (message,) = resolve_on_hub("http://127.0.0.1:9", "hf://PleIAs/SYNTH@main")
    assert message.startswith(
        "Retriable dataset.source: hf://PleIAs/SYNTH@main: the Hugging Face hub does not answer"
    )
    assert "copy the parquet files to a bucket" in message


def test_text_is_unchanged_except_surrogates_and_invalid_bytes() -> None:
    values = strings(
        b"caf\xc3\xa9 \0",
        b"lone \xed\xa0\x80 end",
        b"pair \xed\xa0\xbd\xed\xb8\x80",
        b"\xff\xfe",
        b"cut \xe2\x86",
        None,
        b"",
    )
    texts = decode_columns(pa.record_batch({"query": values}), ["query", "absent"])
    assert texts.columns["query"] == ["café \0", "lone \ufffd end", "pair 😀", None, None, None, ""]
    assert texts.columns["absent"] == [None] * 7
    assert texts.surrogates == {1, 2}
    assert texts.unreadable == {
        3: "query is not UTF-8: byte 0 of 2 is 0xff",
        4: "query is not UTF-8: byte 4 of 6 is 0xe2",
    }


def test_a_surrogate_is_encoded_as_tiktoken_encodes_it() -> None:
    values = [b"a \xed\xb0\x80 b", b"\xed\xa0\xbd\xed\xb8\x80", b"\xed\xb8\x80\xed\xa0\xbd"]
    for value, decoded in zip(
        values, text.decode_columns(pa.record_batch({"q": strings(*values)}), ["q"]).columns["q"], strict=True
    ):
        assert vocabulary_file.encoding().encode_ordinary(
            decoded or ""
        ) == vocabulary_file.encoding().encode_ordinary(value.decode("utf-8", "surrogatepass"))


def rows_batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [{name: row.get(name) for name in COLUMNS} for row in rows],
        schema=pa.schema([(name, pa.string()) for name in COLUMNS]),
    )


def test_a_chunk_becomes_documents_and_counts_of_dropped_rows() -> None:
    good = {
        "synth_id": "good",
        "query": "q",
        "synthetic_reasoning": "r",
        "synthetic_answer": "a",
        "language": "en",
        "exercise": "mcq",
    }
    batch = rows_batch(
        [
            good,
            {**good, "synthetic_answer": " "},
            {**good, "constraints": "result: Failed after maximum attempts"},
            {**good, "synthetic_answer": "41", "constraints": "result: 42"},
            {**good, "query": "word " * 500},
            {**good, "query": None},
            {**good, "synth_id": None, "synthetic_reasoning": None, "language": None, "exercise": None},
            {**good, "query": " " * 1_000_000 + "\U00032718"},
        ]
    )
    got = encode.encode_chunk(make_chunk(2, "in/x.parquet", 100, batch), CONTEXT)
    assert got.rows == 8
    assert got.labels_D == [("good", "en", "mcq"), ("in/x.parquet#106", None, None)]
    assert got.contradictions == {103: ("good", Contradiction("42", "41"))}
    assert got.dropped == {"blankAnswer": 1, "failedGeneration": 1, "contradictedResult": 1, "tooLong": 1}
    assert list(got.unreadable) == [105, 107]
    assert got.unreadable[105] == "query is null"
    assert got.lengths_D3[1, 1] == 0
    renderer = Renderer(tokenizer(), SETTING)
    expected = [renderer.render("q", None, "r", "a").ids, renderer.render("q", None, None, "a").ids]
    assert got.ids_T.tolist() == np.concatenate(expected).tolist()
    assert len(set(got.order_D.tolist())) == 2


@pytest.mark.parametrize("blank", [None, "", "  ", "\t", "\u00a0", "\u3000\n"])
def test_blank_labels_and_queries_of_a_row(blank: str | None) -> None:
    """Labels: none. A null query is unreadable; an empty one is a document and counted."""
    row = {"synth_id": "a", "synthetic_answer": "x", "query": "q", "language": blank, "exercise": blank}
    got = encode.encode_chunk(make_chunk(0, "x", 0, rows_batch([row, {**row, "query": blank}])), CONTEXT)
    assert set(got.labels_D) == {("a", None, None)}
    assert (len(got.labels_D), got.empty_queries, len(got.unreadable)) == (
        (1, 0, 1) if blank is None else (2, 1, 0)
    )
    assert got.hashes_2D.dtype == np.uint64 and got.hashes_2D.shape == (2, len(got.labels_D))


def test_fingerprints_are_those_of_id_and_user_message() -> None:
    row = {"synth_id": "a", "synthetic_answer": "x", "query": "q"}
    rows = [row, row, {**row, "synth_id": "b"}, {**row, "query": "other"}, {**row, "query_seed_text": "seed"}]
    (ids, queries) = encode.encode_chunk(make_chunk(0, "x", 0, rows_batch(rows)), CONTEXT).hashes_2D.tolist()
    assert [len(set(ids[:count])) for count in (2, 3, 4, 5)] == [1, 2, 2, 2]
    assert [len(set(queries[:count])) for count in (2, 3, 4, 5)] == [1, 1, 2, 3]


def test_a_document_of_the_maximum_length_is_kept_and_a_longer_one_dropped() -> None:
    row = sample.rows()[0]
    length = len(
        Renderer(tokenizer(), SETTING)
        .render(row["query"], row["query_seed_text"], row["synthetic_reasoning"], row["synthetic_answer"])
        .ids
    )
    for bound, kept in ((length, 1), (length - 1, 0)):
        got = encode.encode_chunk(
            make_chunk(0, "x", 0, rows_batch([row])),
            PreprocessContext("0" * 64, CONVERSATION, bound, 0.0, Thresholds((BINS,) * 4)),
        )
        assert (len(got.labels_D), got.dropped["tooLong"]) == (kept, 1 - kept)


def test_rows_above_the_threshold_of_their_class_are_not_sampled() -> None:
    got = encode.encode_chunk(
        make_chunk(0, "x", 0, rows_batch(sample.rows())),
        PreprocessContext("0" * 64, CONVERSATION, 4096, 0.0, Thresholds((BINS, 0, BINS, 0))),
    )
    assert got.dropped["notSampled"] > 30
    assert not any(exercise == "memorization" for _, _, exercise in got.labels_D)
