"""Checks that a file has the columns of SYNTH, as text. Pure.

Every file is checked before any part of a dataset is built. Text is any kind of string, also
dictionary-encoded (categories of pandas); rows.py reads it as plain strings.
"""

from collections import Counter

from vpmoe.data.inputs import REMEDY, InputFault
from vpmoe.data.preprocess.footer import Footer

REQUIRED = ("synth_id", "query", "synthetic_reasoning", "synthetic_answer")
"""Columns that every file must have."""

NULLABLE = ("query_seed_text", "constraints", "language", "exercise")
"""Columns that a file may lack."""

FILLED = ("query", "synthetic_answer")
"""Columns without which no row can become a document. pandas writes a column without any value as nulls."""

SHOWN = 30
"""Columns of a file that an error lists."""


def check_columns(url: str, footer: Footer) -> None:
    """Raise InputFault if a required column is missing or empty, one that is used is there twice or not text,
    or one that may be missing is there under a name that differs in case or blanks. Of a file without rows no
    type counts: pandas writes its columns as numbers or nulls."""
    count = Counter(field.name for field in footer.fields)
    kinds = {field.name: field for field in footer.fields}
    present = [name for name in REQUIRED + NULLABLE if name in count]
    missing = [name for name in REQUIRED if name not in count]
    faults, rows = [], sum(footer.rows)
    if missing:
        shown = ", ".join(map(visible, list(count)[:SHOWN])) + (", …" if len(count) > SHOWN else "")
        faults.append(f"no column {', '.join(missing)}; the file has {shown or 'none'}")
    for name in NULLABLE:
        similar = [found for found in count if found.strip("\ufeff \t\r\n").casefold() == name]
        if name not in count and similar:
            faults.append(f"no column {name}, but {', '.join(map(visible, similar))}")
    for name in present:
        if count[name] > 1:
            faults.append(f"column {name} is there {count[name]} times")
        elif rows and not kinds[name].text:
            faults.append(f"column {name} has type {kinds[name].type}, not text")
        elif rows and kinds[name].type == "null" and name in FILLED:
            faults.append(f"column {name} is null in every row")
    if faults:
        raise InputFault(
            f"{url}: {'; '.join(faults)}. Files in dataset.source need the columns of PleIAs/SYNTH, each "
            f"once and as strings; {', '.join(REQUIRED)} are required. {REMEDY}"
        )


def visible(name: str) -> str:
    """The name; in quotes, with escapes, if it has characters that cannot be seen or a blank at an end."""
    return name if name and name.isprintable() and name == name.strip() else repr(name)
