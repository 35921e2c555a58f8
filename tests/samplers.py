"""A student behind vLLM in a process of its own (`python -m tests.samplers`), loaded as a teacher is: it scores, and it samples."""

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.teachers import Remote, serve
from vpmoe.teacher.scorer import Scorer, prepare_environment

Samples = list[tuple[NDArray[np.int32], NDArray[np.float32]]]
"""For each prompt the sampled ids, and vLLM's own log-probability of each."""


class Sampler(Remote):
    """Asks that process. A list of sequences is a question for scores, a tuple one for samples, a path one to load what lies there."""

    def sample(self, prompts: list[NDArray[np.int32]], tokens: int, seed: int) -> Samples:
        """`tokens` tokens after each prompt, at temperature 1, the n-th prompt's with seed `seed` + n."""
        return self._ask((prompts, tokens, seed))

    def load(self, folder: Path) -> int:
        """Take the weights in `folder` into the running engine; returns how many tensors."""
        return self._ask(folder)

    def _ask(self, question: object) -> Any:
        self._connection.send(question)
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Student(Scorer):
    def sample(self, prompts: list[NDArray[np.int32]], tokens: int, seed: int) -> Samples:
        import vllm

        always = {"max_tokens": tokens, "temperature": 1.0, "top_p": 1.0, "logprobs": 0, "detokenize": False, "ignore_eos": True}
        settings = [vllm.SamplingParams(**always, seed=seed + n) for n in range(len(prompts))]
        made = []
        for answer in self._llm.generate([{"prompt_token_ids": ids.tolist()} for ids in prompts], settings, use_tqdm=False):
            (out,) = answer.outputs
            logp = [by_id[token].logprob for by_id, token in zip(out.logprobs, out.token_ids, strict=True)]
            made.append((np.array(out.token_ids, np.int32), np.array(logp, np.float32)))
        return made

    def load(self, folder: Path) -> int:
        """Take other weights into the running engine; returns how many tensors."""
        held = [item for file in sorted(folder.glob("*.safetensors")) for item in load_file(file).items()]
        (loaded,) = self._llm.apply_model(lambda model: len(model.load_weights(held)))
        return loaded


def answer(student: Student, asked: Any) -> object:
    match asked:
        case Path():
            return student.load(asked)
        case tuple():
            return student.sample(*asked)
    return list(student.score(asked))


if __name__ == "__main__":
    prepare_environment()
    plugins = tomllib.loads(Path("pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    for name, value in plugins.items():  # as vLLM does where this repository is installed
        EntryPoint(name, value, "vllm.general_plugins").load()()
    student = Student(Path(sys.argv[2]), int(sys.argv[3]))
    serve(sys.argv[1], lambda asked: answer(student, asked))
