"""Fixtures of the unit tests: torch on the CPU with one rank, a tiny teacher, and vLLM engines."""

import os
from collections.abc import Iterator
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


# An engine needs 5 GB, so it is stopped after each module. With session scope, several would run at once.
@pytest.fixture(scope="module")
def teacher_address(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a process that has loaded that teacher with vpmoe.inference.teacher_engine."""
    with engine_process("tests.fakes.tiny_teacher", teacher, tmp_path_factory.mktemp("scorer")) as address:
        yield address


@pytest.fixture
def scorer(teacher_address: str) -> Iterator["Remote"]:
    """A connection to the shared teacher."""
    from tests.fakes.tiny_teacher import LONGEST, Remote

    with Remote(teacher_address, LONGEST) as remote:
        yield remote


@pytest.fixture(scope="module")
def engines(device: "torch.device") -> "Iterator[EnginePool]":
    """The sampler's engine for the shape `tiny`. The first test that loads weights starts it."""
    from tests.fakes.tiny_teacher import LONGEST
    from vpmoe.inference.engine_pool import EnginePool

    with EnginePool(1, "tiny", LONGEST) as started:
        yield started
