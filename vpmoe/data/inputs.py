"""Resolves `dataset.source` to an ordered list of input shards, each pinned to the content that was listed.

Shard i becomes part i of the dataset. An S3 object is pinned by size and ETag, a file of a Hugging Face
dataset by its commit. A run resolves its source only once (dataset.py). Shards are read by
preprocess/rows.py.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, paths


@dataclass(frozen=True)
class InputShard:
    """One input file."""

    url: str
    """s3://bucket/key or hf://datasets/owner/name@commit/path"""
    size: int
    """Bytes."""
    etag: str
    """For a file on the Hugging Face hub: the id of its content."""

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Inputs:
    """The shards of a source, sorted by URL."""

    source: str
    commit: str | None
    """Commit of a Hugging Face dataset; None for a bucket."""
    shards: tuple[InputShard, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "commit": self.commit,
            "shards": [asdict(shard) for shard in self.shards],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Inputs":
        return cls(found["source"], found["commit"], tuple(InputShard(**shard) for shard in found["shards"]))


def resolve_source(source: str, bucket: Bucket) -> Inputs:
    """List the files that a source matches now. `bucket` is any bucket of the store that holds s3:// sources.

    Raises Permanent if nothing matches or the hub has no such dataset or revision, Retriable if the hub
    cannot be reached, StorageError if the store cannot be listed.
    """
    if source.startswith("hf://"):
        from vpmoe.data import hub  # imported only if needed: the hub's client takes seconds to import

        commit, files = hub.list_parquet_files(source)
        shards = [InputShard(*file) for file in files]
    else:
        commit, shards = None, _list_bucket(source, bucket)
    if not shards:
        raise Permanent(
            f"dataset.source: {source} matches no parquet file. "
            "Check the path (* does not match a slash, ** does)."
        )
    return Inputs(source, commit, tuple(sorted(shards, key=lambda shard: shard.url)))


def _list_bucket(source: str, bucket: Bucket) -> list[InputShard]:
    name, glob = paths.split_url(source)
    store = bucket.other(name)
    prefix = re.split(r"[*?\[]", glob, maxsplit=1)[0]
    wanted = glob_pattern(glob)
    return [
        InputShard(store.url(found.key), found.size, found.etag)
        for found in store.list(prefix)
        if wanted.fullmatch(found.key)
    ]


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The regular expression of a glob of keys: `*` and `?` match within a folder, `**` across folders,
    `[abc]` one character."""
    tokens = re.split(r"(\*\*/?|\*|\?|\[[^\]]+\])", glob)
    patterns = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile(
        "".join(
            patterns.get(token) or (token if token.startswith("[") else re.escape(token)) for token in tokens
        ),
        re.DOTALL,
    )
