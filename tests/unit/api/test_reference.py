"""The API reference in docs/ is generated from the models and complete."""

from pathlib import Path

from vpmoe.api.reference import render

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "api.md"


def test_the_committed_reference_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run `make manifests`"


def test_every_field_is_described() -> None:
    rows = [line for line in render().splitlines() if line.startswith(("| `", "| ["))]
    assert [row for row in rows if not row.rpartition(" | ")[2].removesuffix(" |").strip()] == []
