"""The tests of the teacher's steps share one engine: its start takes longer than what they ask it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.engine_process import engine_process


# No test after those of this folder has an engine, so no two run at once.
@pytest.fixture(scope="session")
def teacher_address(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """As in tests/unit/conftest.py, for all modules of this folder."""
    with engine_process("tests.fakes.tiny_teacher", teacher, tmp_path_factory.mktemp("scorer")) as address:
        yield address
