"""A teacher in vLLM, in a process of its own, which gives its GPU back when it ends.

`python -m tests.fakes.scored_teacher FOLDER INPUT OUTPUT`: scores the sequences of INPUT (npz) with the model
in FOLDER, and writes their log-probabilities, and "forward", the tokens of a forward, to OUTPUT (npz).
"""

import sys
from pathlib import Path

import numpy as np

from vpmoe.inference.teacher_engine import TeacherEngine


def main(folder: Path, given: Path, output: Path) -> None:
    sequences = list(np.load(given).values())
    engine = TeacherEngine(folder, max(map(len, sequences)))
    scored = {f"sequence{number}": logp_T for number, logp_T in enumerate(engine.score(sequences))}
    np.savez(output, forward=np.array(engine.forward_tokens), **scored)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
