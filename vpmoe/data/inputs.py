"""Resolves `dataset.source` to an ordered list of input shards, each pinned to the content that was listed.

Shard i becomes part i of the dataset. An S3 object is pinned by size and ETag, a file of a Hugging Face
dataset by its commit. A run resolves its source only once (dataset.py). Shards are read by
preprocess/rows.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from vpmoe.data.glob import escape, glob_pattern, literal_prefix
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, Object, paths

REPLACED = "\ufffd"
"""What some stores list for a character of a key that XML cannot hold. It may also be part of a key."""


class InputFault(Permanent):
    """An input file that cannot be used. The next attempt lists the source again, so that it finds the file
    repaired or removed."""


REMEDY = (
    "Write the file again or remove it, and start the step again (in a cluster raise runtime.attempts): it "
    "then lists dataset.source again. Or exclude the file from dataset.source in a new run."
)
"""What to do about an InputFault of one file."""


@dataclass(frozen=True)
class InputShard:
    """One input file."""

    url: Annotated[str, Field(pattern="^(s3|hf)://[^/]+/(?s:.)")]
    """s3://bucket/key or hf://datasets/owner/name@commit/path"""
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    etag: str
    """For a file on the Hugging Face hub: the id of its content."""

    @property
    def key(self) -> str:
        """The object's key, or the file's path in the Hugging Face dataset. No two files of a source share
        it, and a copy of the source in another bucket or at another commit has the same."""
        if self.url.startswith("hf://"):
            return self.url.partition("@")[2].partition("/")[2]
        return paths.split_url(self.url)[1]


@dataclass(frozen=True)
class Inputs:
    """The shards of a source, sorted by URL."""

    source: str
    commit: str | None
    """Commit of a Hugging Face dataset; None for a bucket."""
    shards: Annotated[tuple[InputShard, ...], Field(min_length=1)]

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "commit": self.commit,
            "shards": [asdict(shard) for shard in self.shards],
        }


def resolve_source(source: str, bucket: Bucket) -> Inputs:
    """List the files that a source matches now. `bucket` is any bucket of the store that holds s3:// sources.

    Raises Permanent if nothing matches or the hub has no such dataset or revision, Retriable if the hub
    cannot be reached, StorageError if the store cannot be listed.
    """
    if source.startswith("hf://"):
        from vpmoe.data import hub  # imported only if needed: the hub's client takes seconds to import

        commit, files = hub.list_parquet_files(source)
        shards = [InputShard(*file) for file in files]
        if not shards:
            raise Permanent(
                f"dataset.source: {source} has no *.parquet file. Name another dataset or revision."
            )
    else:
        commit, shards = None, _list_bucket(source, bucket)
    return Inputs(source, commit, tuple(sorted(shards, key=lambda shard: shard.url)))


def _list_bucket(source: str, bucket: Bucket) -> list[InputShard]:
    name, glob = paths.split_url(source)
    store = bucket.other(name, "dataset.source")
    try:
        wanted = glob_pattern(glob)
    except ValueError as error:
        raise Permanent(
            f"dataset.source: {source}: {error} An object of exactly this name is {store.url(escape(glob))}"
        ) from error
    listed = ListedKeys(glob)
    shards = [
        InputShard(store.url(found.key), found.size, store.pin(found).etag)
        for found in listed.watch(store.list(literal_prefix(glob)))
        if wanted.fullmatch(found.key)
    ]
    if not shards:
        raise Permanent(f"dataset.source: {source} {listed.why_nothing_matches(name)}")
    for shard in shards:
        if REPLACED in shard.key and not store.exists(shard.key):
            raise Permanent(
                f"dataset.source: the store lists {shard.url!r}, but has no object of this name. Its listing "
                "has \ufffd for each character that XML cannot hold, such as a control character. Rename the "
                "object without them."
            )
    return shards


class ListedKeys:
    """Watches a listing for what the user may have meant by a source that matches none of its keys."""

    def __init__(self, glob: str) -> None:
        self._glob = glob
        folder = glob.removesuffix("/")
        # A key counts for the first that matches it.
        self._instead = {
            f"{folder}{ending}": glob_pattern(folder + ending)
            for ending in ("/*.parquet", "/**/*.parquet", "/*", "/**")
        }
        self._matching: set[str] = set()
        self._same_name = False

    def watch(self, listed: Iterable[Object]) -> Iterator[Object]:
        """The objects of a listing, without the empty objects that mark a folder, `folder/`."""
        for found in listed:
            if found.size == 0 and found.key.endswith("/"):
                continue
            self._same_name |= found.key == self._glob
            for glob, pattern in self._instead.items():
                if pattern.fullmatch(found.key):
                    self._matching.add(glob)
                    break
            yield found

    def why_nothing_matches(self, bucket: str) -> str:
        """Why no key that was listed matches the glob, and what to write instead."""
        if self._same_name:
            return (
                "is the name of an object, but its * ? or [ ] make it a pattern that does not match this "
                f"name. Write s3://{bucket}/{escape(self._glob)}"
            )
        folder, deeper, *any_name = (
            f"s3://{bucket}/{glob}" if glob in self._matching else "" for glob in self._instead
        )
        if folder and deeper:
            return f"names a folder. Name the files in it, {folder}, or with deeper folders, {deeper}"
        if folder or deeper:
            return f"names a folder. Name the files in it: {folder or deeper}"
        if any(any_name):
            return (
                "names a folder, in which no file is called *.parquet. If its files are parquet files, write "
                f"{any_name[1] or any_name[0]}"
            )
        return (
            "matches no parquet file. Check the path: * does not match a slash, ** does; braces and "
            "everything else but * ? and [ ] stand for themselves."
        )
