"""The bucket: the only thing that the operator and the jobs share.

Objects and their hashes are `bucket`'s, what makes a set of objects exist is `manifest`'s, where everything
lies is `paths`'s. `python -m vpmoe.storage verify s3://bucket/prefix` proves every manifest below a prefix.
The format is described in docs/storage.md.
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
