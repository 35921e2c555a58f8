"""A file on this machine's disk that appears whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from vpmoe.storage.errors import StorageError


@contextmanager
def written_whole(path: Path, size: int, source: str) -> Iterator[BinaryIO]:
    """A temporary file beside `path`, renamed to it when it is written and synced; removed on any error.

    Raises StorageError (Local) if the disk cannot hold the `size` bytes of `source`.
    """
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"{source}: its {size} bytes cannot be written to {path}: {error.strerror}. Free space there, or "
            "point TMPDIR (in a pod: "
            "runtime.resources' ephemeral storage) to more.",
            "Local",
        ) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
