"""The repository's own sample of rows with PleIAs/SYNTH's columns and quirks, written for it: small enough to
read, real text to train on.

`rows.jsonl` holds them, a row a line: eight languages, the exercises of SYNTH, passages in the public domain
as seed texts, and the quirks that preprocessing must survive (blank reasoning, a blank answer, a NUL, null
language and exercise, a generation that was given up, an answer that its own check contradicts). `python -m
demo.sample FOLDER` writes them as parquet shards.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = Path(__file__).with_name("rows.jsonl")

COLUMNS = (
    "synth_id",
    "language",
    "exercise",
    "model",
    "query",
    "query_seed_url",
    "query_seed_text",
    "additional_seed_url",
    "seed_license",
    "constraints",
    "script",
    "synthetic_reasoning",
    "synthetic_answer",
)
SCHEMA = pa.schema([*((name, pa.string()) for name in COLUMNS), ("words", pa.int64())])


def rows() -> list[dict[str, Any]]:
    """All rows, as they stand in the file."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def write(folder: Path, shards: int = 3) -> list[Path]:
    """Write the rows as `folder`/synth_001.parquet …, every language spread over all shards. Returns the
    files in order."""
    folder.mkdir(parents=True, exist_ok=True)
    by_language = sorted(rows(), key=lambda row: row["language"] or "")
    paths = [folder / f"synth_{number + 1:03d}.parquet" for number in range(shards)]
    for number, path in enumerate(paths):
        pq.write_table(pa.Table.from_pylist(by_language[number::shards], schema=SCHEMA), path)
    return paths
