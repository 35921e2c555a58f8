"""Decodes Arrow string columns to Python text. Their bytes may be invalid UTF-8. Pure.

Arrow does not validate strings, so a file may contain surrogates (three bytes that UTF-8 forbids, left by
UTF-16 programs) or garbage. A surrogate pair becomes its character and a lone surrogate U+FFFD, as in
tiktoken, and the row is counted. Garbage makes the row unreadable. Everything else, including NULs, is kept
byte for byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa


@dataclass(frozen=True)
class UnreadableRows:
    """Rows [first, stop) of a file, counted from 0, that could not be read."""

    first: int
    stop: int
    reason: str


@dataclass
class DecodedRows:
    """Some columns of consecutive rows as text: `columns[name][row]`, None for null and for a missing
    column."""

    columns: dict[str, list[str | None]]
    unreadable: dict[int, str] = field(default_factory=dict)
    """By row of this batch (from 0), why a value is not text. All values of the row are None."""
    surrogates: set[int] = field(default_factory=set)
    """Rows in which surrogates were replaced."""


def decode_columns(batch: pa.RecordBatch, names: Sequence[str]) -> DecodedRows:
    """Decode the columns `names` of a batch of rows."""
    texts = DecodedRows({})
    for name in names:
        index = batch.schema.get_field_index(name)
        texts.columns[name] = (
            [None] * batch.num_rows if index < 0 else _column(batch.column(index), name, texts)
        )
    return texts


def _column(values: pa.Array, name: str, texts: DecodedRows) -> list[str | None]:
    try:
        decoded: list[str | None] = values.to_pylist()
    except UnicodeDecodeError:  # at least one value of the column is invalid: decode one by one
        raw = values.cast(pa.large_binary()).to_pylist()
        decoded = [_value(value, name, row, texts) for row, value in enumerate(raw)]
    return decoded


def _value(value: bytes | None, name: str, row: int, texts: DecodedRows) -> str | None:
    if value is None:
        return None
    try:
        text = value.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        texts.unreadable[row] = (
            f"{name} is not UTF-8: byte {error.start} of {len(value)} is 0x{value[error.start]:02x}"
        )
        return None
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if whole != text:
        texts.surrogates.add(row)
    return whole
