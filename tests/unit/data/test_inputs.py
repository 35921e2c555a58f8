"""Names of input objects on a real S3 store: what a pattern matches, what is refused, and that every object
is read by its exact key."""

import io
import random
import unicodedata
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpmoe.data import canary
from vpmoe.data.glob import escape, glob_pattern
from vpmoe.data.inputs import resolve_source
from vpmoe.data.preprocess.columns import REQUIRED
from vpmoe.data.preprocess.rows import ShardReader
from vpmoe.data.preprocess.text import UnreadableRows, decode_columns
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, Object, StorageError
from vpmoe.teacher import model


def parquet(*ids: str) -> bytes:
    """A file of one row an id."""
    file = io.BytesIO()
    pq.write_table(pa.table({name: [f"{name} of {one}" for one in ids] for name in REQUIRED}), file)
    return file.getvalue()


def read_ids(source: str, bucket: Bucket) -> list[str]:
    """All ids of a source, in the order of its files."""
    found = []
    for shard in resolve_source(source, bucket).shards:
        for batch in ShardReader(shard, bucket, REQUIRED).batches(10):
            assert not isinstance(batch, UnreadableRows)
            found += decode_columns(batch.columns, ["synth_id"]).columns["synth_id"]
    return [str(one).removeprefix("synth_id of ") for one in found]


NAMES = [
    "[1].parquet",
    "a[!b]",
    "[",
    "]",
    "*",
    "**",
    "?",
    "w?x=1&y=2",
    "a\\b",
    "x::y",
    "zip::s3:",
    "simplecache::x.parquet",
    "two  blanks",
    " blank first and last ",
    "50%",
    "%2F%20",
    "#1",
    "a+b c",
    "'single' \"double\"",
    unicodedata.normalize("NFC", "Zoë é"),
    unicodedata.normalize("NFD", "Zoë é"),
    "雪🪨",
    "line\nbreak",
    "tab\there",
    "carriage\rreturn",
    "{a,b}",
    "$HOME~",
    "a;b|c>d",
    "x.parquet.gz",
    "y.zip",
    "z.tar.bz2",
    "no-extension",
    "@main",
    "..three",
    "n" * 250,
    "\u202eleft\u200b",
]


@pytest.fixture(scope="module")
def strange(store: Bucket, s3: object) -> Bucket:
    """A bucket with a file of every strange name, and one with every name as a folder."""
    folder = "strange-names"
    (s3.folder / folder).mkdir()  # type: ignore[attr-defined]
    bucket = store.other(folder)
    for number, name in enumerate(NAMES):
        bucket.put_bytes(f"in/{name}", parquet(f"file {number}"), {})
        bucket.put_bytes(f"folders/{name}/deep", parquet(f"folder {number}"), {})
    return bucket


def test_every_name_that_a_pattern_matches_is_read(strange: Bucket) -> None:
    numbered = sorted(range(len(NAMES)), key=lambda number: NAMES[number])
    assert read_ids(strange.url("in/*"), strange) == [f"file {number}" for number in numbered]
    numbered = sorted(range(len(NAMES)), key=lambda number: f"{NAMES[number]}/deep")
    assert read_ids(strange.url("folders/**"), strange) == [f"folder {number}" for number in numbered]


@pytest.mark.parametrize("number", range(len(NAMES)), ids=lambda name: ascii(name)[:40])
def test_an_escaped_name_is_one_object(strange: Bucket, number: int) -> None:
    assert read_ids(strange.url(escape(f"in/{NAMES[number]}")), strange) == [f"file {number}"]


@pytest.mark.parametrize("name", ["shard[3].parquet", "x[a]y", "[0]", "d[12]/e.parquet", "\\[9]?"])
def test_a_name_that_is_another_pattern_is_refused_with_the_right_one(bucket: Bucket, name: str) -> None:
    bucket.put_bytes(f"in/{name}", parquet("the one"), {})
    with pytest.raises(Permanent, match="is the name of an object, but") as error:
        resolve_source(bucket.url(f"in/{name}"), bucket)
    assert read_ids(str(error.value).rpartition("Write ")[2], bucket) == ["the one"]


@pytest.mark.parametrize("character", ["\x01", "\x07", "\x1b", "\x1f", "\uffff"])
def test_a_name_that_the_store_cannot_list_is_refused(bucket: Bucket, character: str) -> None:
    """versitygw lists characters that XML cannot hold as U+FFFD."""
    bucket.put_bytes(f"in/a{character}.parquet", parquet("lost"), {})
    with pytest.raises(Permanent, match="Rename the object") as error:
        resolve_source(bucket.url("in/*"), bucket)
    assert "dataset.source" in str(error.value) and bucket.url("in/a\ufffd.parquet") in str(error.value)


def test_a_name_with_the_replacement_character_itself_is_read(bucket: Bucket) -> None:
    bucket.put_bytes("in/a\ufffdb.parquet", parquet("kept"), {})
    assert read_ids(bucket.url("in/*"), bucket) == ["kept"]


def test_a_listing_out_of_order_by_a_name_that_it_cannot_hold_says_so(bucket: Bucket) -> None:
    for name in ("a\x01b", "a\tb"):
        bucket.put_bytes(f"in/{name}", parquet(name), {})
    with pytest.raises(StorageError, match="in place of a control character"):
        resolve_source(bucket.url("in/*"), bucket)


MATCHES = [
    ("*.parquet", "a.parquet", True),
    ("*.parquet", "a/b.parquet", False),
    ("*", "a\nb", True),
    ("**.parquet", "a/b.parquet", True),
    ("**/x", "x", True),
    ("**/x", "a/b/x", True),
    ("a/**/x", "a/x", True),
    ("?", "/", False),
    ("??", "ab", True),
    ("[a-c]", "b", True),
    ("[a-c]", "-", False),
    ("[a-]", "-", True),
    ("[-a]", "-", True),
    ("[a-cx-z]", "y", True),
    ("[+-9]", "/", False),
    ("[+-9]", "5", True),
    ("[a!^]", "^", True),
    ("[\\d]", "5", False),
    ("[\\d]", "\\", True),
    ("[a&&b]", "&", True),
    ("[.]", "x", False),
    ("[é]", "é", True),
    ("{a,b}", "a", False),
    ("{a,b}", "{a,b}", True),
    ("a]", "a]", True),
    ("(a|b)+$", "a", False),
    ("(a|b)+$", "(a|b)+$", True),
]


@pytest.mark.parametrize("glob, key, expected", MATCHES)
def test_what_a_pattern_matches(glob: str, key: str, expected: bool) -> None:
    assert (glob_pattern(glob).fullmatch(key) is not None) == expected


def test_an_escaped_key_matches_itself_alone() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    keys = ["".join(rng.choices("[]*?\\!^-ab/:{}\né ", k=rng.randrange(1, 9))) for _ in range(3000)]
    for key in keys:
        pattern = glob_pattern(escape(key))
        assert pattern.fullmatch(key)
        assert not [other for other in rng.sample(keys, 20) if other != key and pattern.fullmatch(other)]


REFUSED = {
    "[!b].parquet": "[!b] negates a set",
    "x/[^0-9]*": "[^0-9] negates a set",
    "[!].parquet": "[!] negates a set",
    "[z-a]": "[z-a] has the range z-a, which is backwards. Write a-z",
    "part-[9-0]?": "[9-0] has the range 9-0, which is backwards",
    "[a-cZ-B]": "[a-cZ-B] has the range Z-B",
    "shard[1.parquet": "no ] closes [1.parquet",
    "shard[": "no ] closes [",
    "[a]/[b": "no ] closes [b",
    "[]": "[] is a set without characters",
    "a[]b]": "[] is a set without characters",
    "[[:digit:]]": "[[:digit:]] is a character class",
    "[[.a.]]": "[[.a.]] is a character class",
    "[a/b]": "[a/b] holds a slash",
}


@pytest.mark.parametrize("glob", REFUSED)
def test_a_malformed_pattern_is_refused_by_name(bucket: Bucket, glob: str) -> None:
    with pytest.raises(Permanent) as error:
        resolve_source(bucket.url(glob), bucket)
    assert str(error.value).startswith(f"dataset.source: {bucket.url(glob)}: {REFUSED[glob]}")
    assert str(error.value).endswith(bucket.url(escape(glob)))


@pytest.mark.parametrize(
    "keys, source, instead",
    [
        (["f/a.parquet"], "f", "f/*.parquet"),
        (["f/a.parquet", "f/b/c.parquet"], "f/", "f/**/*.parquet"),
        (["f/x/a.parquet", "f/x/b.parquet"], "f", "f/**/*.parquet"),
        (["out.parquet/part-0.parquet", "out.parquet/_SUCCESS"], "out.parquet", "out.parquet/*.parquet"),
        (["y=1/a.parquet", "y=2/a.parquet"], "y=*", "y=*/*.parquet"),
        (["y=1/z=1/a.parquet"], "y=?/", "y=?/**/*.parquet"),
        (["f/part-0", "f/part-1"], "f", "f/*"),
        (["f/g/part-0"], "f", "f/**"),
        (["f[1]/a.parquet"], "f[[]1]", "f[[]1]/*.parquet"),
    ],
)
def test_a_folder_is_refused_with_the_pattern_that_works(
    bucket: Bucket, keys: Sequence[str], source: str, instead: str
) -> None:
    for key in keys:
        bucket.put_bytes(f"in/{key}", parquet(key), {})
    bucket.put_bytes("in/unrelated.parquet", parquet("unrelated"), {})
    with pytest.raises(Permanent, match=r"dataset.source: .* names a folder") as error:
        resolve_source(bucket.url(f"in/{source}"), bucket)
    proposed = str(error.value).rpartition(" ")[2]
    assert proposed == bucket.url(f"in/{instead}")
    assert read_ids(proposed, bucket) == [key for key in sorted(keys) if "_SUCCESS" not in key]


def test_empty_markers_of_folders_are_left_out(bucket: Bucket) -> None:
    bucket.put_bytes("in/", b"", {})
    bucket.put_bytes("in/deeper/", b"", {})
    bucket.put_bytes("in/a", parquet("a"), {})
    bucket.put_bytes("in/deeper/b", parquet("b"), {})
    assert read_ids(bucket.url("in/*"), bucket) == ["a"]
    assert read_ids(bucket.url("in/**"), bucket) == ["a", "b"]


class MemoryStore:
    """The part of Bucket that reads, for keys that versitygw resolves as paths of a disk."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def other(self, name: str, field: str = "") -> "MemoryStore":
        return self

    def pin(self, found: Object) -> Object:
        return found

    def url(self, key: str) -> str:
        return f"s3://memory/{key}"

    def list(self, prefix: str) -> Iterator[Object]:
        return (Object(key, len(data), "e") for key, data in self.objects.items() if key.startswith(prefix))

    def get(self, key: str) -> bytes:
        return self.objects[key]

    def fetch_range(self, wanted: Object, start: int, stop: int) -> bytes:
        return self.objects[wanted.key][start:stop]


PATHS = [
    "/a",
    "a//b",
    "//",
    "a/../b",
    "../a",
    "./a",
    "a/.",
    "trailing/",
    "a//",
    "nul\0",
    "\x01\x7f",
    "k" * 1024,
]


@pytest.mark.parametrize("key", PATHS, ids=lambda name: ascii(name)[:40])
def test_a_key_is_not_a_path(key: str) -> None:
    others = {other: parquet(f"other {other}") for other in PATHS if other != key}
    store = MemoryStore({**others, key: parquet("the one")})
    assert read_ids(store.url(escape(key)), store) == ["the one"]  # type: ignore[arg-type]


def test_a_canary_and_a_model_are_read_by_their_exact_names(bucket: Bucket) -> None:
    for name in NAMES[:20]:
        bucket.put_bytes(f"texts/{name}", f"the text of {name}".encode(), {})
        bucket.put_bytes(f"models/{name}/config.json", b"{}", {})
        bucket.put_bytes(f"models/{name}/a.safetensors", b"{}", {})
    for name in NAMES[:20]:
        (text,) = canary.read_texts(bucket.url(f"texts/{name}"), bucket)
        assert text.size > 5
        found = model.find_teacher(bucket.url(f"models/{name}"), bucket)
        assert [file.name for file in found.files] == ["a.safetensors", "config.json"]
    assert len(canary.read_texts(bucket.url("texts"), bucket)) == 20


@pytest.mark.parametrize("name", [".", "..", "a\0b", "ü" * 130, "x" * 300], ids=lambda name: ascii(name)[:40])
def test_a_model_file_that_no_disk_can_hold_is_refused_by_name(name: str) -> None:
    store = MemoryStore({f"m/{name}": b"", "m/config.json": b"{}", "m/a.safetensors": b""})
    with pytest.raises(Permanent, match=r"teacher.model: s3://memory/m: no file of a disk can be called"):
        model.find_teacher("s3://memory/m", store)  # type: ignore[arg-type]
