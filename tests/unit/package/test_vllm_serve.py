"""vLLM's server finds the student by the package's entry point, in an environment without the checkout."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import clean_environment, policy_versions
from tests.fakes.policy_versions import TINY
from tests.fakes.students import new_seed
from tests.fakes.vllm_server import serve
from vpmoe.inference import hf_model

LENGTH = 256


def post(address: str, body: Any) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.engine
def test_a_server_with_the_wheel_alone_continues_as_transformers_does(
    wheel: Path, device: torch.device, tmp_path: Path
) -> None:
    seed = new_seed()
    exported = policy_versions.export(tmp_path / "student", policy_versions.learner(device, seed))
    prompt = np.random.default_rng(seed).integers(0, TINY.vocabulary, 40).tolist()
    programs = clean_environment.install_beside_everything(wheel, tmp_path / "venv")
    options = ("--tokens-only", f"--max-model-len={LENGTH}")
    with serve(programs, exported, tmp_path, *options) as address:
        answer = post(
            f"{address}/inference/v1/generate",
            {
                "token_ids": prompt,
                "sampling_params": {"max_tokens": 16, "temperature": 0, "ignore_eos": True},
            },
        )
    model = hf_model.load_student(exported, TINY)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert answer["choices"][0]["token_ids"] == expected[0, 40:].tolist()
