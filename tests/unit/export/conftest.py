"""A tiny student as a model folder, and openai-harmony, which the tests compare with."""

from pathlib import Path

import pytest
import torch
from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding

from tests.fakes import policy_versions
from tests.fakes.model_folders import write_learner
from tests.fakes.students import new_seed
from vpmoe.data import vocabulary_file
from vpmoe.model.learner import Learner


@pytest.fixture(scope="session")
def student(device: torch.device) -> Learner:
    """A tiny student in which every part affects the output."""
    return policy_versions.learner(device, new_seed())


@pytest.fixture(scope="session")
def folder(student: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That student's model folder, in float32."""
    return write_learner(tmp_path_factory.mktemp("export") / "vpmoe-tiny", student, positions=4096)


@pytest.fixture(scope="session")
def harmony() -> HarmonyEncoding:
    vocabulary_file.install()
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
