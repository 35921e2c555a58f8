"""The trainer's figure of the canary equals that of each token given what the rule says comes before it."""

import math

import numpy as np
import pytest
import torch

from tests.fakes import students
from tests.fakes.students import SMALL, new_seed
from vpmoe.api.microbatch import Microbatch
from vpmoe.data.canary import CanaryText, texts_digest
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.trainer.data import collate
from vpmoe.trainer.data.canary_windows import CanaryWindows

LENGTH = 24
MICROBATCH = Microbatch(rows=2, few_shapes=True)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[CanaryText]:
    """Texts shorter and longer than a window; two of them have no token to count."""
    monkeypatch.setattr(collate, "PADDING", 0)  # the small vocabulary has no other
    random = np.random.default_rng(new_seed())
    return [
        CanaryText(f"{number}" * 64, random.integers(0, SMALL.vocabulary, tokens, np.int32), 5 * tokens)
        for number, tokens in enumerate((0, 1, 2, 7, LENGTH - 1, LENGTH, LENGTH + 1, 100))
    ]


def test_the_bits_are_those_of_every_token_once(texts: list[CanaryText], device: torch.device) -> None:
    learner = students.learner(device)
    with torch.no_grad():
        for parameter in learner.student.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    bits = 0.0
    for text in texts:
        for t in range(1, len(text.ids_T)):
            start = 0
            while start + LENGTH <= t:  # the first window that has the token
                start += math.ceil(LENGTH / 2)
            ids = torch.from_numpy(text.ids_T[start : t + 1].astype(np.int64))[None]
            spans = torch.zeros_like(ids, dtype=torch.uint8)
            spans[0, -1] = 2
            alone = Batch.from_rows(ids, spans, torch.zeros_like(ids, dtype=torch.int32))
            bits -= float(learner.logp(alone)[len(ids[0]) - 2]) / math.log(2)
    found = CanaryWindows(texts, LENGTH, MICROBATCH).measure(learner)
    size = sum(text.size for text in texts)
    # float32 with another order of summation: 1e-4 nats a token, of which there are fewer than bytes
    assert abs(found.bits_per_byte - bits / size) <= 1e-4 / math.log(2) and bits > size / 5
    assert (found.bytes, found.sha256) == (size, texts_digest(texts))


def test_ranks_share_the_windows_in_equally_many_batches(
    texts: list[CanaryText], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_ranks = []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        of_ranks.append(CanaryWindows(texts, LENGTH, MICROBATCH).batches)
    assert len({len(batches) for batches in of_ranks}) == 1
    counted = sum(int(batch.counts[2]) for batches in of_ranks for batch in batches)
    assert counted == sum(max(len(text.ids_T) - 1, 0) for text in texts)


def test_a_student_that_is_not_finite_is_an_error(texts: list[CanaryText], device: torch.device) -> None:
    learner = students.learner(device)
    with torch.no_grad():
        learner.student.output.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="the canary's bits per byte"):
        CanaryWindows(texts, LENGTH, MICROBATCH).measure(learner)
