"""Garbage collection while modules are imported."""

import gc

import pytest

from vpmoe.process.memory import no_collection


def test_what_an_import_makes_is_not_looked_through_again() -> None:
    before = gc.get_freeze_count()
    try:
        with no_collection():
            assert not gc.isenabled()
            made = [[number] for number in range(1000)]
        assert gc.isenabled() and gc.get_freeze_count() - before >= len(made)
        with pytest.raises(ImportError), no_collection():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
