"""One queue for the sampler's engines on GPUs, as many as the machine has: every request is answered once,
with the log-probabilities of its own tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fakes import policy_versions
from tests.fakes.students import new_seed
from vpmoe.inference.engine_pool import EnginePool, SamplingRequest

LONGEST = 512
REQUESTS = 96
DEPTH = 8
"""Requests that an engine holds: few, so that the queue is used often."""
FLOAT32 = 1e-4
"""Allowed difference of log p in nats, as in test_sampler.py."""


@pytest.mark.timeout(400)
def test_engines_that_share_a_queue_answer_every_request_once(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    folder = policy_versions.export(tmp_path, policy_versions.learner(device, new_seed()))
    torch.cuda.empty_cache()
    random = np.random.default_rng(new_seed())
    requests = [
        SamplingRequest(random.integers(0, 1000, int(random.integers(3, 60)), dtype=np.int32), n, int(limit))
        for n, limit in enumerate(random.choice([20, 60, 150], REQUESTS))
    ]
    with EnginePool(torch.cuda.device_count(), "tiny", LONGEST, DEPTH) as engines:
        engines.load(folder)
        next(engines.sample_queue(requests))  # given up: it has no effect on what follows
        found = dict(engines.sample_queue(requests))
        expected = engines.sample(requests)
        scores = engines.score([np.concatenate([requests[n].ids_P, found[n].ids_C]) for n in range(REQUESTS)])
    assert sorted(found) == list(range(REQUESTS))
    worst = max(
        np.abs(of_engine[n][-len(found[n].ids_C) :] - found[n].logp_C).max()
        for of_engine in scores
        for n in range(REQUESTS)
    )
    equal = sum(np.array_equal(found[n].ids_C, one.ids_C) for n, one in enumerate(expected))
    print(f"QUEUE {len(scores)} engines: {equal} of {REQUESTS} equal, log p within {worst:.2e}")
    assert worst <= FLOAT32
    assert equal >= REQUESTS * 0.95, "a draw that falls between two tokens within rounding is rare"
