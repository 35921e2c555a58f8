"""openai-harmony's encoding."""

import pytest
from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding

from vpmoe.data import vocabulary_file


@pytest.fixture(scope="session")
def harmony() -> HarmonyEncoding:
    vocabulary_file.install()
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
