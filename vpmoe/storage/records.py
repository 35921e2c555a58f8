"""Reads the JSON records that jobs write for later jobs, such as a step's progress or the counts of a part.

A record may have been altered, cut off, or written by a version with other fields. All of that is one error,
which names the object and the field. Manifests have a format of their own, in manifest.py; facts_of checks
what a manifest of some kind has beside it.
"""

import json

from pydantic import TypeAdapter, ValidationError

from vpmoe.storage.bucket import Bucket
from vpmoe.storage.errors import StorageError
from vpmoe.storage.manifest import Manifest


def load_record[T](bucket: Bucket, key: str, form: type[T]) -> T:
    """The record at `key`: a dataclass, a TypedDict or a pydantic model, or a dict with their keys.

    Raises StorageError: Missing if there is none, Altered if it is not JSON or lacks what `form` has.
    """
    try:
        adapter: TypeAdapter[T] = TypeAdapter(form)
        found = bucket.get_json(key)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate can be read, but not be written
        return adapter.validate_python(found)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{bucket.url(key)}: {_first_fault(error)}. It was altered, or written by another version. "
            "Restore it, or delete it to have it written again.",
            "Altered",
        ) from error


def facts_of[T](bucket: Bucket, found: Manifest, kind: str, form: type[T]) -> T:
    """The facts of a manifest, which must be of this kind. Raises StorageError (Altered) if it is of another
    kind, or its facts lack what `form` has."""
    try:
        if found.kind != kind:
            raise ValueError(f"it is the manifest of {found.kind}, not of {kind}")
        adapter: TypeAdapter[T] = TypeAdapter(form)
        return adapter.validate_python(found.facts)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{bucket.url(found.key)}: {_first_fault(error)}. It was altered, or written by another version. "
            "Restore it, or delete it and what it names to have them built again.",
            "Altered",
        ) from error


def _first_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, fault['loc'])) or 'content'}: {fault['msg']}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
