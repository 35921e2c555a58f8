"""The bucket: what the jobs share. The operator has no access to it.

bucket.py reads and writes objects with hashes, manifest.py defines when a set of objects exists, paths.py has
the keys. `python -m vpmoe.storage verify s3://bucket/prefix` verifies every manifest below a prefix.
docs/reference/bucket.md is the specification.
"""

from vpmoe.storage import manifest, paths
from vpmoe.storage.blocks import BLOCK, Stored, Subject
from vpmoe.storage.bucket import Bucket, Object
from vpmoe.storage.errors import StorageError
from vpmoe.storage.retries import JOB, Patience

__all__ = [
    "BLOCK",
    "JOB",
    "Bucket",
    "Object",
    "Patience",
    "StorageError",
    "Stored",
    "Subject",
    "manifest",
    "paths",
]
