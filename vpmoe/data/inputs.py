"""What `dataset.source` stands for: the input shards, in order, each pinned to the very content that was listed.

Shard i becomes part i of the data set. An S3 object is pinned by size and ETag, a file of a Hugging Face data set by its commit.
Reading them is rows.py's business; that a run resolves its source only once is dataset.py's.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, paths


@dataclass(frozen=True)
class Shard:
    """One input file. `url` is s3://bucket/key, or hf://datasets/owner/name@commit/path; `etag` of the hub's is the content's id."""

    url: str
    size: int
    etag: str

    @property
    def name(self) -> str:
        """The file's name without its folders."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Inputs:
    """The shards of a source, sorted by URL; `commit` is a Hugging Face data set's, None for a bucket."""

    source: str
    commit: str | None
    shards: tuple[Shard, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "commit": self.commit,
            "shards": [asdict(shard) for shard in self.shards],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Inputs":
        return cls(found["source"], found["commit"], tuple(Shard(**shard) for shard in found["shards"]))


def discover(source: str, bucket: Bucket) -> Inputs:
    """List what a source stands for now. `bucket` is any bucket of the store that s3:// sources lie in.

    Raises Permanent where nothing matches or the hub knows no such data set or revision, Retriable where the hub cannot be reached,
    StorageError where the store cannot be listed.
    """
    if source.startswith("hf://"):
        from vpmoe.data import (
            hub,  # here, because few runs need it and importing the hub's client takes seconds
        )

        commit, files = hub.parquet_files(source)
        shards = [Shard(*file) for file in files]
    else:
        commit, shards = None, _in_a_bucket(source, bucket)
    if not shards:
        raise Permanent(
            f"dataset.source: {source} stands for no parquet file. Check the path (* does not cross a slash, ** does)."
        )
    return Inputs(source, commit, tuple(sorted(shards, key=lambda shard: shard.url)))


def _in_a_bucket(source: str, bucket: Bucket) -> list[Shard]:
    name, glob = paths.split_url(source)
    store = bucket.other(name)
    fixed = re.split(r"[*?\[]", glob, maxsplit=1)[0]
    wanted = glob_pattern(glob)
    return [
        Shard(store.url(found.key), found.size, found.etag)
        for found in store.list(fixed)
        if wanted.fullmatch(found.key)
    ]


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob of object keys: `*` and `?` stay within a folder, `**` crosses folders, `[abc]` is one of these characters."""
    tokens = re.split(r"(\*\*/?|\*|\?|\[[^\]]+\])", glob)
    meaning = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile(
        "".join(
            meaning.get(token) or (token if token.startswith("[") else re.escape(token)) for token in tokens
        ),
        re.DOTALL,
    )
