"""Fixtures of the unit tests: torch on the CPU with one rank, a tiny teacher, and vLLM engines."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fakes import clean_environment
from tests.fakes.engine_process import engine_process
from tests.fakes.store import S3
from vpmoe.storage import Bucket

if TYPE_CHECKING:
    import torch

    from tests.fakes.tiny_teacher import Remote
    from vpmoe.inference.engine_pool import EnginePool


@pytest.hookimpl(trylast=True)  # of those that are selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run modules whose tests share an engine after all others, first those of the student's, then those of
    the teacher's: each engine is started once, and has ended when the other starts."""
    turn_of: dict[Path, int] = {}
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        turn = 2 if "teacher_address" in fixtures else 1 if "engines" in fixtures else 0
        turn_of[item.path] = max(turn, turn_of.get(item.path, 0))
    items.sort(key=lambda item: turn_of[item.path])


@pytest.fixture(scope="session")
def device() -> "Iterator[torch.device]":
    """The CPU, with megatron-core's process groups of one rank."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from vpmoe.model import distributed
    from vpmoe.model.device import choose

    chosen = choose()
    distributed.start(chosen)
    yield chosen
    distributed.stop()
    del os.environ["CUDA_VISIBLE_DEVICES"]
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return clean_environment.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random GPT-OSS in float32."""
    from tests.fakes import tiny_teacher

    return tiny_teacher.write(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def stored_teacher(teacher: Path, s3: S3, store: Bucket) -> str:
    """The URI of that teacher in the S3 store. It has 100 MB, so tests that only read it share it."""
    (s3.folder / "teachers").mkdir()
    bucket = store.other("teachers")
    for path in teacher.iterdir():
        bucket.put_file(f"tiny/{path.name}", path, {})
    return bucket.url("tiny")


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[ExitStack]:
    """The engine that tests share now. An engine needs 5 GB, so the next one is started after this has been
    closed."""
    with ExitStack() as running:
        yield running


@pytest.fixture(scope="session")
def teacher_address(shared_engine: ExitStack, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The socket of a process that has loaded that teacher with vpmoe.inference.teacher_engine."""
    shared_engine.close()
    scratch = tmp_path_factory.mktemp("scorer")
    return shared_engine.enter_context(engine_process("tests.fakes.tiny_teacher", teacher, scratch))


@pytest.fixture
def scorer(teacher_address: str) -> Iterator["Remote"]:
    """A connection to the shared teacher."""
    from tests.fakes.tiny_teacher import LONGEST, Remote

    with Remote(teacher_address, LONGEST) as remote:
        yield remote


@pytest.fixture(scope="session")
def engines(shared_engine: ExitStack, device: "torch.device") -> "EnginePool":
    """The sampler's engine for the shape `tiny`. The first test that loads weights starts it."""
    from tests.fakes.tiny_teacher import LONGEST
    from vpmoe.inference.engine_pool import EnginePool

    shared_engine.close()
    return shared_engine.enter_context(EnginePool(1, "tiny", LONGEST))
