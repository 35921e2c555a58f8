"""Footers and columns of parquet files: which files are refused before any part is built, by name and with
what is wrong, and that nothing in a footer ends the process or costs more than its bounds."""

import base64
import gzip
import io
import random
import struct
from collections.abc import Callable
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from vpmoe.data.inputs import InputFault, InputShard, resolve_source
from vpmoe.data.preprocess import footer
from vpmoe.data.preprocess.columns import NULLABLE, REQUIRED
from vpmoe.data.preprocess.encode import COLUMNS
from vpmoe.data.preprocess.footer import DamagedFooter, FooterParser, footer_bytes
from vpmoe.data.preprocess.rows import RowBatch, ShardReader
from vpmoe.data.preprocess.text import UnreadableRows, decode_columns
from vpmoe.failure import Retriable
from vpmoe.storage import Bucket

VALUES = ["one", None, "é🪨", "one", "nul\0"]


def write(table: pa.Table, **options: Any) -> bytes:
    """The table as a parquet file."""
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def rows_table(**columns: Any) -> pa.Table:
    """Five rows with all columns; a column that is None is left out."""
    found = {name: pa.array(VALUES) for name in REQUIRED + NULLABLE} | columns
    return pa.table({name: values for name, values in found.items() if values is not None})


def put(bucket: Bucket, data: bytes) -> InputShard:
    """The file as an input shard."""
    bucket.put_bytes("in/x.parquet", data, {})
    (shard,) = resolve_source(bucket.url("in/x.parquet"), bucket).shards
    return shard


def parse(data: bytes, parser: FooterParser = footer.PARSER) -> footer.Footer:
    return parser.parse(footer_bytes(len(data), lambda start, stop: data[start:stop]))


def read_query(bucket: Bucket, data: bytes) -> list[str | None]:
    """The values of `query`, read three at a time."""
    found: list[str | None] = []
    for batch in ShardReader(put(bucket, data), bucket, COLUMNS).batches(3):
        assert isinstance(batch, RowBatch)
        found += decode_columns(batch.columns, ["query"]).columns["query"]
    return found


def unchecked(*values: bytes) -> pa.Array:
    """Strings that are not checked to be UTF-8."""
    raw = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])


def test_every_column_is_checked() -> None:
    assert set(COLUMNS) == set(REQUIRED + NULLABLE)


TEXT = {
    "string": pa.array(VALUES),
    "large_string": pa.array(VALUES, pa.large_string()),
    "string_view": pa.array(VALUES, pa.string_view()),
    "dictionary": pa.array(VALUES).dictionary_encode(),
    "dictionary of large_string": pa.array(VALUES, pa.large_string()).dictionary_encode(),
    "dictionary with 8-bit indices": pa.array(VALUES)
    .dictionary_encode()
    .cast(pa.dictionary(pa.int8(), pa.string())),
    "ordered dictionary": pa.DictionaryArray.from_arrays(
        pa.array([0, None, 1, 0, 2]), pa.array(["one", "é🪨", "nul\0"]), ordered=True
    ),
    "dictionary that lists a value twice": pa.DictionaryArray.from_arrays(
        pa.array([0, None, 2, 1, 3]), pa.array(["one", "one", "é🪨", "nul\0"])
    ),
    "chunks with their own dictionaries": pa.chunked_array(
        [pa.array(VALUES[:2]).dictionary_encode(), pa.array(VALUES[2:]).dictionary_encode()]
    ),
    "chunks of large dictionaries": pa.chunked_array(
        [
            pa.array(part, pa.large_string()).dictionary_encode()
            for part in (VALUES[:1], VALUES[1:4], VALUES[4:])
        ]
    ),
    "pandas categories": pa.Array.from_pandas(pandas.Series(VALUES, dtype="category")),
    "pandas strings": pa.Array.from_pandas(pandas.Series(VALUES, dtype="string")),
    "pandas objects": pa.Array.from_pandas(pandas.Series(VALUES, dtype=object)),
}


@pytest.mark.parametrize("options", [{}, {"store_schema": False}, {"row_group_size": 2}], ids=str)
@pytest.mark.parametrize("kind", TEXT)
def test_every_kind_of_text_is_read(bucket: Bucket, kind: str, options: dict[str, Any]) -> None:
    assert read_query(bucket, write(rows_table(query=TEXT[kind]), **options)) == VALUES


def test_invalid_text_in_a_dictionary_costs_its_rows_alone(bucket: Bucket) -> None:
    words = pa.DictionaryArray.from_arrays(
        pa.array([0, 1, 2, 3, 1], pa.int32()), unchecked(b"a", b"\xff", b"\xed\xa0\x80", b"b")
    )
    (batch,) = ShardReader(put(bucket, write(rows_table(query=words))), bucket, COLUMNS).batches(9)
    assert isinstance(batch, RowBatch)
    found = decode_columns(batch.columns, COLUMNS)
    assert found.columns["query"] == ["a", None, "\ufffd", "b", None]
    assert list(found.unreadable) == [1, 4] and found.surrogates == {2}


OTHER_TYPES = {
    "int64": pa.array(range(5)),
    "bool": pa.array([True] * 5),
    "double": pa.array([0.5] * 5),
    "binary": pa.array([b"x"] * 5),
    "large_binary": pa.array([b"x"] * 5, pa.large_binary()),
    "fixed_size_binary": pa.array([b"xy"] * 5, pa.binary(2)),
    "list<element: string>": pa.array([["x"]] * 5),
    "struct<text: string>": pa.array([{"text": "x"}] * 5),
    "map<string, string": pa.array([[("a", "b")]] * 5, pa.map_(pa.string(), pa.string())),
    "timestamp": pa.array([0] * 5, pa.timestamp("ms")),
    "decimal128": pa.array([None] * 5, pa.decimal128(9, 2)),
    "time64": pa.array([0] * 5, pa.time64("us")),
}


@pytest.mark.parametrize("name", ["query", "constraints", "language"])
@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_a_column_of_another_type_is_named(bucket: Bucket, kind: str, name: str) -> None:
    shard = put(bucket, write(rows_table(**{name: OTHER_TYPES[kind]})))
    with pytest.raises(InputFault) as error:
        ShardReader(shard, bucket, ("synth_id",))
    assert str(error.value).startswith(f"{shard.url}: column {name} has type {kind}")
    assert "not text" in str(error.value) and "Write the file again or remove it" in str(error.value)


def twice(name: str) -> pa.Table:
    table = rows_table()
    return pa.Table.from_arrays([*table.columns, table[name]], [*table.column_names, name])


FAULTS: dict[str, tuple[pa.Table, str]] = {
    "all missing": (pa.table({"text": ["x"]}), f"no column {', '.join(REQUIRED)}; the file has text."),
    "no columns": (pa.table({}), f"no column {', '.join(REQUIRED)}; the file has none."),
    "another case": (
        rows_table(query=None, Query=pa.array(VALUES)),
        "no column query; the file has synth_id,",
    ),
    **{
        f"a name with {what}": (
            pa.table({name: VALUES, **{each: VALUES for each in REQUIRED if each != "query"}}),
            f"no column query; the file has {shown}, synth_id, ",
        )
        for what, name, shown in [
            ("a blank at the end", "query ", "'query '"),
            ("a byte order mark", "\ufeffquery", r"'\ufeffquery'"),
            ("a zero-width space", "que\u200bry", r"'que\u200bry'"),
            ("a line break", "query\r", r"'query\r'"),
            ("nothing", "", "''"),
            ("a blank inside", "the query", "the query"),
            ("letters of all scripts", "вопрос", "вопрос"),
        ]
    },
    **{
        f"a nullable column called {found!r}": (
            rows_table(**{name: None, found: pa.array(VALUES)}),
            f"no column {name}, but {shown}.",
        )
        for name, found, shown in [
            ("language", "Language", "Language"),
            ("constraints", "CONSTRAINTS", "CONSTRAINTS"),
            ("exercise", "exercise ", "'exercise '"),
            ("query_seed_text", "\ufeffquery_seed_text", r"'\ufeffquery_seed_text'"),
            ("language", "language\r", r"'language\r'"),
        ]
    },
    "no id": (rows_table(synth_id=None), "no column synth_id; the file has query, "),
    "id twice": (twice("synth_id"), "column synth_id is there 2 times."),
    "a nullable column twice": (twice("exercise"), "column exercise is there 2 times."),
    "answers of nulls": (
        rows_table(synthetic_answer=pa.nulls(5)),
        "column synthetic_answer is null in every row.",
    ),
    "several": (
        rows_table(synth_id=None, query=pa.array(range(5)), language=pa.array([b"x"] * 5)),
        "no column synth_id; the file has query, synthetic_reasoning, synthetic_answer, query_seed_text, "
        "constraints, language, exercise; column query has type int64, not text; column language has type "
        "binary, not text.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_the_columns_is_named(bucket: Bucket, fault: str) -> None:
    table, message = FAULTS[fault]
    shard = put(bucket, write(table))
    with pytest.raises(InputFault) as error:
        ShardReader(shard, bucket, ("synth_id",))
    assert str(error.value).startswith(f"{shard.url}: {message}")


ACCEPTED = {
    "only what is required": rows_table(**dict.fromkeys(NULLABLE)),
    "nullable columns of nulls": rows_table(**{name: pa.nulls(5) for name in NULLABLE}),
    "no reasoning at all": rows_table(synthetic_reasoning=pa.nulls(5)),
    "other columns of any type": rows_table(words=pa.array(range(5)), tags=pa.array([["x"]] * 5)),
    "another column twice": pa.Table.from_arrays(
        [*rows_table().columns, *[pa.array(range(5))] * 2], [*rows_table().column_names, "words", "words"]
    ),
    "no rows, written by pandas": pa.Table.from_pandas(pandas.DataFrame({name: [] for name in COLUMNS})),
    "no rows, no types": pa.table({name: pa.nulls(0) for name in COLUMNS}),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_files_that_are_right(bucket: Bucket, kind: str) -> None:
    table = ACCEPTED[kind]
    assert read_query(bucket, write(table)) == (VALUES if table.num_rows else [])


class LocalKeys(pe.KmsClient):
    """Keys that wrap others by not changing them."""

    def __init__(self, config: pe.KmsConnectionConfig) -> None:
        super().__init__()

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return base64.b64decode(wrapped_key)


def encrypted(**options: Any) -> bytes:
    factory = pe.CryptoFactory(LocalKeys)
    configuration = pe.EncryptionConfiguration(footer_key="footer", **options)
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), configuration)
    return write(rows_table(), encryption_properties=properties)


def with_footer(data: bytes, length: int | None = None) -> bytes:
    """A file with this footer."""
    return b"PAR1" + data + struct.pack("<I", len(data) if length is None else length) + b"PAR1"


def orc() -> bytes:
    file = io.BytesIO()
    pa.orc.write_table(rows_table(), file)
    return file.getvalue()


def ipc() -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_file(file, rows_table().schema) as writer:
        writer.write_table(rows_table())
    return file.getvalue()


GOOD = write(rows_table())
FOOTER = GOOD[-8 - struct.unpack("<I", GOOD[-8:-4])[0] : -8]

DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "one byte": (lambda: b"P", "it does not end with PAR1 but with b'P'"),
    "only the magic": (lambda: b"PAR1", "it does not end with PAR1"),
    "both magics": (lambda: b"PAR1PAR1", "its footer says that it has 827474256 bytes, in a file of 8"),
    "no footer": (lambda: with_footer(b""), "its footer says that it has 0 bytes, in a file of 12"),
    "cut in the rows": (lambda: GOOD[:300], "it begins as a parquet file, so it was cut"),
    "cut in the footer": (lambda: GOOD[:-20], "it begins as a parquet file, so it was cut"),
    "cut by a byte": (lambda: GOOD[:-1], "it begins as a parquet file, so it was cut"),
    "a line break after it": (lambda: GOOD + b"\n", "it begins as a parquet file"),
    "a web page": (lambda: b"\n<!DOCTYPE html><html><body>Sign in", "it begins as a web page or XML"),
    "a store's error": (lambda: b'<?xml version="1.0"?><Error><Code>NoSuchKey', "web page or XML"),
    "JSON lines": (lambda: b'{"query": "x"}\n', "it begins as JSON"),
    "CSV": (lambda: b"synth_id,query\n1,x\n", "it does not end with PAR1 but with b'1,x\\n'"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "it is a pointer of Git LFS"),
    "compressed": (lambda: gzip.compress(GOOD), "it is compressed with gzip"),
    "Arrow": (ipc, "it is an Arrow file"),
    "ORC": (orc, "it is an ORC file"),
    "a zip": (lambda: b"PK\x03\x04rest of it", "it is a zip archive"),
    "sparse": (lambda: bytes(100_000), "it begins with zero bytes"),
    "encrypted": (lambda: encrypted(uniform_encryption=True), "its footer is encrypted"),
    "encrypted columns": (lambda: encrypted(column_keys={"c": ["query"]}), "its footer is encrypted"),
    "encrypted columns, open footer": (
        lambda: encrypted(column_keys={"c": ["query"]}, plaintext_footer=True),
        "its footer ends Arrow with SIGABRT: Cannot decrypt ColumnMetadata",
    ),
    "a footer longer than the file": (lambda: with_footer(FOOTER, 2**31), "it has 2147483648 bytes"),
    "a footer of zeros": (lambda: with_footer(bytes(5000)), "its footer cannot be parsed"),
    "a footer of text": (lambda: with_footer(b"not thrift " * 50), "its footer cannot be parsed"),
    "half a footer": (lambda: with_footer(FOOTER[: len(FOOTER) // 2]), "its footer cannot be parsed"),
    "a list of two billion": (
        lambda: with_footer(b"\x15\x02\x19\xfc\xff\xff\xff\xff\x07"),
        "Exceeded size limit",
    ),
    "nesting without end": (lambda: with_footer(b"\x1c" * 1_000_000), "its footer cannot be parsed"),
    "rows that do not add up": (
        lambda: with_footer(FOOTER.replace(b"\x16\x0a\x19\x1c", b"\x16\x08\x19\x1c")),
        "it says 4 rows, its row groups say [5]",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_not_parquet_is_named_with_what_it_is(bucket: Bucket, kind: str) -> None:
    make, message = DAMAGED[kind]
    shard = put(bucket, make())
    with pytest.raises(InputFault) as error:
        ShardReader(shard, bucket, COLUMNS)
    assert str(error.value).startswith(f"{shard.url}: not a parquet file: ")
    assert message in str(error.value)


def test_random_damage_of_a_footer_never_ends_the_process() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    parsed = 0
    for _ in range(400):
        changed = bytearray(FOOTER)
        for _ in range(rng.choice([1, 1, 2, 5])):
            changed[rng.randrange(len(changed))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        try:
            found = parse(with_footer(bytes(changed)))
        except DamagedFooter:
            continue
        assert sum(found.rows) >= 0
        parsed += 1
    assert 0 < parsed < 400
    assert parse(GOOD).rows == (5,)


def many_groups() -> bytes:
    """A right file whose footer has some megabytes."""
    return write(rows_table().take(pa.array([0] * 2000)), row_group_size=1, compression="none")


def test_a_footer_is_parsed_within_bounds_of_memory_and_time() -> None:
    data = many_groups()
    assert parse(data).rows == (1,) * 2000
    with pytest.raises(DamagedFooter, match=r"it takes more than 1 MiB of memory|ends Arrow with SIGABRT"):
        parse(data, FooterParser(memory=1 << 20))
    with pytest.raises(DamagedFooter, match="to parse"):
        parse(data, FooterParser(cpu_seconds=0.001))


def test_a_parser_that_is_killed_from_outside_is_no_damage() -> None:
    parser = FooterParser()
    assert parse(GOOD, parser).rows == (5,)
    assert parser._child is not None
    parser._child.process.kill()
    with pytest.raises(Retriable, match="memory ran out"):
        parse(GOOD, parser)
    assert parse(GOOD, parser).rows == (5,)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "lz4", "none"])
def test_damaged_rows_are_named_by_row_group_and_counted_once(bucket: Bucket, compression: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    table = pa.table({name: [f"{name} {row} {rng.random()}" for row in range(300)] for name in COLUMNS})
    whole = write(table, row_group_size=100, compression=compression, write_page_checksum=True)
    column = pq.read_metadata(pa.BufferReader(whole)).row_group(1).column(rng.randrange(len(COLUMNS)))
    data = bytearray(whole)
    start = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2
    data[start : start + 8] = bytes(byte ^ 0xFF for byte in data[start : start + 8])
    found = list(ShardReader(put(bucket, bytes(data)), bucket, COLUMNS).batches(64))
    covered = []
    for batch in found:
        if isinstance(batch, UnreadableRows):
            assert batch.reason.startswith("row group 1 is damaged: ")
            covered += range(batch.first, batch.stop)
        else:
            covered += range(batch.first, batch.first + batch.columns.num_rows)
    assert covered == list(range(300))
    assert [one.stop for one in found if isinstance(one, UnreadableRows)] == [200]
