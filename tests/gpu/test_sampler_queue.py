"""Two engines of the sampler on each GPU of the machine, with one queue for all: every request is answered
once, with the log-probabilities of its own tokens, before and after other weights are loaded, and engines
take no more memory than was planned."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.fakes import policy_versions
from tests.fakes.students import new_seed
from vpmoe.api.card import GIB
from vpmoe.api.memory import STUDENTS
from vpmoe.inference import hf_model
from vpmoe.inference.engine_pool import EnginePool, SamplingRequest
from vpmoe.plan.sampling import divide_card

LONGEST = 512
REQUESTS = 96
DEPTH = 8
"""Requests that an engine holds: few, so that the queue is used often."""
FLOAT32 = 1e-4
"""Allowed difference of log p in nats, as in test_sampler.py."""
SHARED = 2
"""Engines on each GPU."""


@pytest.mark.timeout(400)
def test_engines_that_share_gpus_and_a_queue_answer_every_request_once(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    other, folder = (
        policy_versions.export(tmp_path / name, policy_versions.learner(device, new_seed()))
        for name in ("other", "student")
    )
    random = np.random.default_rng(new_seed())
    requests = [
        SamplingRequest(random.integers(0, 1000, int(random.integers(3, 60)), dtype=np.int32), n, int(limit))
        for n, limit in enumerate(random.choice([20, 60, 150], REQUESTS))
    ]
    # Together longer than a step of vLLM, so that it holds as many logits as it ever does.
    probe = [random.integers(0, 1000, LONGEST - 1, dtype=np.int32) for _ in range(10)]
    wanted = [transformers_logp(each, probe) for each in (other, folder)]
    gpus = range(torch.cuda.device_count())
    torch.cuda.empty_cache()
    before = [torch.cuda.mem_get_info(gpu)[0] for gpu in gpus]
    with EnginePool(len(gpus), "tiny", LONGEST, DEPTH, SHARED) as engines:
        engines.load(other)
        check_versions(engines.score(probe), wanted[0])
        next(engines.sample_queue(requests))  # given up: it has no effect on what follows
        engines.load(folder)
        check_versions(engines.score(probe), wanted[1])
        found = dict(engines.sample_queue(requests))
        expected = engines.sample(requests)
        scores = engines.score([np.concatenate([requests[n].ids_P, found[n].ids_C]) for n in range(REQUESTS)])
        used = [free - torch.cuda.mem_get_info(gpu)[0] for gpu, free in enumerate(before)]
    assert engines.gpu_of == [*gpus] * SHARED
    check_memory(used)
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


@torch.no_grad()
def transformers_logp(folder: Path, given: list[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
    model = hf_model.load_student(folder, policy_versions.TINY).cuda()
    found = []
    for ids_T in given:
        ids = torch.from_numpy(ids_T.astype(np.int64)).cuda()
        logp_TV = model(ids[None]).logits[0, :-1].float().log_softmax(1)
        found.append(logp_TV.gather(1, ids[1:, None])[:, 0].cpu().numpy())
    return found


def check_versions(scores: list[list[NDArray[np.float32]]], wanted: list[NDArray[np.float32]]) -> None:
    """All engines have the weights that were loaded: other weights differ at nearly every token by nats. One
    token in a hundred may differ, where two experts have nearly equal scores."""
    differences = [np.abs(np.concatenate(one) - np.concatenate(wanted)) for one in scores]
    found = [float(np.quantile(one, 0.99)) for one in differences]
    print(f"QUEUE loaded: log p of {len(found)} engines within {max(found):.2e}")
    assert max(found) <= FLOAT32


def check_memory(used: list[int]) -> None:
    """Each GPU's engines hold no more than the plan counts. It counts weights in bf16, and here they are
    float32."""
    card = torch.cuda.get_device_properties(0).total_memory
    planned = divide_card(STUDENTS["tiny"], card, LONGEST, SHARED)
    assert planned.engines == SHARED
    most = planned.total + planned.engines * planned.weights
    print(f"QUEUE memory: {max(used) / GIB:.2f} GiB in use of a GPU, planned {most / GIB:.2f}")
    assert max(used) <= most
