"""The student with every part of the architecture in vLLM, in a process of its own: no registered shape has
them, so EnginePool cannot start it.

`python -m tests.fakes.complete_engine FOLDER INPUT OUTPUT`: scores the sequences of INPUT (npz), samples a
completion of each prompt, and writes both, and how vLLM keeps keys and values, to OUTPUT (pickle).
"""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.fakes.policy_versions import COMPLETE_TINY
from vpmoe.inference.engine import StudentEngine
from vpmoe.inference.engine_pool import SamplingRequest

LONGEST = 1024
COMPLETION = 150
"""Tokens of a completion: longer than the window of 128."""


def attention_layers(model: Any) -> list[tuple[str, int | None]]:
    """Backend and window of every layer, in order."""
    return [
        (module.attn_backend.get_name(), module.sliding_window)
        for module in model.modules()
        if hasattr(module, "attn_backend")
    ]


def main(folder: Path, given: Path, output: Path) -> None:
    arrays = np.load(given)
    sequences = [arrays[name] for name in arrays.files if name.startswith("sequence")]
    prompts = [arrays[name] for name in arrays.files if name.startswith("prompt")]
    engine = StudentEngine(COMPLETE_TINY, LONGEST)
    engine.load(folder)
    scored = engine.score(sequences)
    sampled = engine.sample(
        [SamplingRequest(ids_P, number, COMPLETION) for number, ids_P in enumerate(prompts)]
    )
    core = engine._llm.llm_engine.engine_core.engine_core
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    cached = {
        name: getattr(group.kv_cache_spec, "sliding_window", None)
        for group in groups
        for name in group.layer_names
    }
    (layers,) = engine._llm.apply_model(attention_layers)
    output.write_bytes(pickle.dumps((scored, sampled, cached, layers)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
