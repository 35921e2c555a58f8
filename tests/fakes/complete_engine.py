"""A student of a shape that is not registered in vLLM, in a process of its own: EnginePool starts registered
ones only.

`python -m tests.fakes.complete_engine SHAPE INPUT OUTPUT FOLDER [FOLDER]`: loads each FOLDER, one after the
other, scores the sequences of INPUT (npz), samples a completion of each prompt, and writes both, and how vLLM
keeps keys and values, to OUTPUT (pickle).
"""

import pickle
import sys
from pathlib import Path

import numpy as np

from tests.fakes.policy_versions import COMPLETE_TINY, COMPLETE_WIDE
from vpmoe.inference.engine import StudentEngine
from vpmoe.inference.engine_pool import SamplingRequest

SHAPES = {shape.name: shape for shape in (COMPLETE_TINY, COMPLETE_WIDE)}
LONGEST = 1024
COMPLETION = 150
"""Tokens of a completion: longer than the window of 128."""


def main(shape: str, given: Path, output: Path, *folders: Path) -> None:
    arrays = np.load(given)
    sequences = [arrays[name] for name in arrays.files if name.startswith("sequence")]
    prompts = [arrays[name] for name in arrays.files if name.startswith("prompt")]
    engine = StudentEngine(SHAPES[shape], LONGEST)
    for folder in folders:
        engine.load(folder)
    scored = engine.score(sequences)
    sampled = engine.sample(
        [SamplingRequest(ids_P, number, COMPLETION) for number, ids_P in enumerate(prompts)]
    )
    output.write_bytes(pickle.dumps((scored, sampled, engine.attention())))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
