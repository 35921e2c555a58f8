"""The teacher's hidden states by vLLM equal those of its checkpoint in transformers, token by token."""

from collections.abc import Iterator, Sequence
from multiprocessing.connection import Client, Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.fakes.engine_process import engine_process
from tests.fakes.students import new_seed
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.inference.teacher_hidden import FORWARD_TOKENS, HiddenStateEngine

LENGTHS = (1, 2, 17, 40, 300, 640, 640, 500, 600)
"""Shorter and longer than the sliding window of 16, up to the engine's maximum. Together they exceed one
forward, so one is computed in chunks."""
assert sum(LENGTHS[:-1]) > FORWARD_TOKENS["cpu"]


@pytest.fixture(scope="module")
def engine(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """A connection to a process with the engine."""
    with (
        engine_process("tests.fakes.hidden_states", teacher, tmp_path_factory.mktemp("engine")) as address,
        Client(address) as connection,
    ):
        yield connection


def hidden_states(engine: Connection, documents: Sequence[Ids]) -> NDArray[np.float32]:
    """The engine's answer."""
    engine.send({"documents": documents})
    answer = engine.recv()
    if isinstance(answer, Exception):
        raise answer
    found: NDArray[np.float32] = answer
    return found


def documents(seed: int, lengths: Sequence[int]) -> list[Ids]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY_SIZE, length, np.int32) for length in lengths]


def test_every_position_agrees_with_one_forward_per_document(engine: Connection, teacher: Path) -> None:
    """The tolerance is for fp32 products of other shapes; magnitudes are 1 to 4."""
    from transformers import GptOssForCausalLM

    reference = GptOssForCausalLM.from_pretrained(teacher, dtype=torch.float32, attn_implementation="eager")
    made = documents(new_seed(), LENGTHS)
    found = hidden_states(engine, made)
    assert found.dtype == np.float32 and found.shape == (sum(LENGTHS), reference.config.hidden_size)
    for ids, found_TG in zip(made, np.split(found, np.cumsum(LENGTHS)[:-1]), strict=True):
        with torch.no_grad():
            wanted = reference.model(torch.from_numpy(ids).long()[None]).last_hidden_state[0].numpy()
        np.testing.assert_allclose(found_TG, wanted, rtol=1e-4, atol=1e-4)
        assert len(ids) < 40 or wanted.std(0).min() > 0.1, "else agreement would show nothing"


def test_the_same_documents_in_the_same_order_have_the_same_bits(engine: Connection) -> None:
    made = documents(new_seed(), (30, 200, 5, 77))
    first = hidden_states(engine, made)
    hidden_states(engine, documents(new_seed(), LENGTHS))
    assert hidden_states(engine, made).tobytes() == first.tobytes()


@pytest.mark.parametrize("length", [0, 641])
def test_a_document_of_another_length_is_rejected(engine: Connection, length: int) -> None:
    with pytest.raises(ValueError, match=f"a document of {length} ids, .* loaded for 1 to 640"):
        hidden_states(engine, documents(0, (5, length)))


def test_no_documents_have_no_hidden_states(engine: Connection) -> None:
    assert hidden_states(engine, []).shape == (0, 64)


def test_a_context_that_is_too_short_is_rejected_before_loading(teacher: Path) -> None:
    with pytest.raises(Permanent, match="max_position_embeddings is 4096, and the longest document is 4097"):
        HiddenStateEngine(teacher, 4097)


def test_a_checkpoint_that_is_not_whole_is_rejected_before_loading(teacher: Path, tmp_path: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((teacher / "config.json").read_bytes())
    with pytest.raises(Permanent, match=r"^teacher\.model: model\.norm\.weight is missing"):
        HiddenStateEngine(tmp_path, 640)
