"""Arrow columns as Python text, where the bytes may not be the UTF-8 that they claim to be. Pure.

Arrow does not look at strings, so a file may carry surrogates (three bytes that UTF-8 forbids, left by UTF-16 programs) or garbage. A
surrogate pair becomes its character and a lone one U+FFFD, as tiktoken itself does with such a str, and the row is counted. Garbage
makes the row unreadable. Everything else, NULs included, stays byte for byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa


@dataclass(frozen=True)
class Unreadable:
    """Rows [first, stop) of a file, from 0, that could not be read, and why."""

    first: int
    stop: int
    why: str


@dataclass
class Texts:
    """Some columns of consecutive rows as text; `columns[name][row]`, None for null and for a column that is not there."""

    columns: dict[str, list[str | None]]
    unreadable: dict[int, str] = field(default_factory=dict)
    """Row (from 0 in this batch) -> why one of its values is not text. Its values are None."""
    surrogates: set[int] = field(default_factory=set)
    """Rows in which surrogates were replaced."""


def decode(batch: pa.RecordBatch, names: Sequence[str]) -> Texts:
    """The text of `names` in a batch of rows."""
    texts = Texts({})
    for name in names:
        index = batch.schema.get_field_index(name)
        texts.columns[name] = (
            [None] * batch.num_rows if index < 0 else _column(batch.column(index), name, texts)
        )
    return texts


def _column(values: pa.Array, name: str, texts: Texts) -> list[str | None]:
    try:
        decoded: list[str | None] = values.to_pylist()
    except UnicodeDecodeError:  # somewhere in this column: look at each value
        raw = values.cast(pa.large_binary()).to_pylist()
        decoded = [_value(value, name, row, texts) for row, value in enumerate(raw)]
    return decoded


def _value(value: bytes | None, name: str, row: int, texts: Texts) -> str | None:
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
