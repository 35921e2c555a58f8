"""Arrow files with a header: what the files of windows and of parts have in common.

A file is one table in the Arrow IPC format; the header, as JSON, is in the metadata of its schema. Equal
content gives equal bytes.
"""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from vpmoe.api.base import Record
from vpmoe.failure import Permanent

HEADER_KEY = b"vpmoe"
"""Key of the header in the metadata of the Arrow schema."""


def arrow_bytes(schema: pa.Schema, columns: Sequence[Sequence[Any]], header: Record) -> bytes:
    """The bytes of a file."""
    metadata = json.dumps(header.dump(), sort_keys=True).encode()
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, schema, strict=True)]
    table = pa.table(arrays, schema=schema.with_metadata({HEADER_KEY: metadata}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def read_table[H: Record](
    data: bytes, schema: pa.Schema, form: type[H], what: str, where: str
) -> tuple[pa.Table, H]:
    """Parse a file: its table and its header.

    `what` the file should be and its address `where`, for errors. Raises Permanent if it is not one.
    """
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        table.validate(full=True)  # its offsets and lengths, before anything is read by them
        found = json.loads(table.schema.metadata[HEADER_KEY])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged(where, f"it is not {what} ({type(error).__name__}: {error})") from error
    if not table.schema.equals(schema):
        raise damaged(where, f"its columns are {', '.join(table.schema.names)}")
    if any(column.null_count for column in table.columns):
        raise damaged(where, "some of its values are null")
    try:
        return table, form.model_validate(found)
    except ValidationError as error:
        raise damaged(where, str(error.errors()[0]["msg"])) from error


def column_values(table: pa.Table, name: str) -> list[Any]:
    """The rows of a column; those of a column of lists as arrays."""
    if pa.types.is_list(table[name].type):
        return list_column(table, name)
    values: list[Any] = table[name].to_pylist()
    return values


def list_column(table: pa.Table, name: str) -> list[NDArray[Any]]:
    """The rows of a column of lists, as arrays."""
    return [row.values.to_numpy() for row in table[name]]


def damaged(where: str, why: str) -> Permanent:
    """The error for an object that cannot be what was written."""
    return Permanent(
        f"{where}: {why}. The object was changed after it was written; delete it to have it written again."
    )
