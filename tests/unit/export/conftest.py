"""A tiny student as a model folder, its tokenizer, and openai-harmony, which the tests compare with."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding
from transformers import AutoTokenizer

from tests.fakes import policy_versions
from tests.fakes.finished_stages import FinishedStage, finish_stage
from tests.fakes.model_folders import write_learner
from tests.fakes.store import S3
from tests.fakes.students import LOCKED, new_seed
from vpmoe.data import vocabulary_file
from vpmoe.export import model_folder, tokenizer_files
from vpmoe.model.learner import Learner


@pytest.fixture(scope="session", autouse=True)
def tokenizer_json() -> Iterator[None]:
    """All folders that are written in this process get the same tokenizer.json. It depends on the vocabulary
    only, and takes as long to compute as the rest of a small folder."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(model_folder, "tokenizer_json", cache(tokenizer_files.tokenizer_json))
        yield


@pytest.fixture(scope="session")
def student(device: torch.device) -> Learner:
    """A tiny student in which every part affects the output."""
    return policy_versions.learner(device, new_seed())


@pytest.fixture(scope="session")
def small_student(device: torch.device) -> Learner:
    """Such a student of 1 MB, for tests that write and read it again and again."""
    return policy_versions.learner(device, new_seed(), LOCKED)


@pytest.fixture(scope="session")
def small_stage(
    s3: S3, sample_parquet: list[Path], small_student: Learner, tmp_path_factory: pytest.TempPathFactory
) -> FinishedStage:
    """A stage that has finished with that student, though its run says `tiny`."""
    return finish_stage(s3, sample_parquet, small_student, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="session")
def folder(student: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That student's model folder, in float32."""
    return write_learner(tmp_path_factory.mktemp("export") / "vpmoe-tiny", student, positions=4096)


@pytest.fixture(scope="session")
def exported(folder: Path) -> Any:
    """The tokenizer of that folder, as transformers opens it."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@pytest.fixture(scope="session")
def harmony() -> HarmonyEncoding:
    vocabulary_file.install()
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
