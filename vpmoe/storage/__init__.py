"""The bucket: the only thing that the operator and the jobs share.

bucket.py reads and writes objects with hashes, manifest.py defines when a set of objects exists, paths.py has
the keys. `python -m vpmoe.storage verify s3://bucket/prefix` verifies every manifest below a prefix.
docs/reference/bucket.md is the specification.
"""

from vpmoe.storage import manifest, paths
from vpmoe.storage.blocks import BLOCK, Stored, Subject
from vpmoe.storage.bucket import Bucket, Object
from vpmoe.storage.client import Credentials
from vpmoe.storage.errors import StorageError
from vpmoe.storage.retries import JOB, OPERATOR, Patience

__all__ = [
    "BLOCK",
    "JOB",
    "OPERATOR",
    "Bucket",
    "Credentials",
    "Object",
    "Patience",
    "StorageError",
    "Stored",
    "Subject",
    "manifest",
    "paths",
]
