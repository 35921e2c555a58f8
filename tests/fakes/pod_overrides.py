"""Changes to the processes of a pod (local_pods.py) where no field of a run has them: a student with fewer
layers, and a part of a GPU's memory.

A sitecustomize.py in front of PYTHONPATH calls `install`, so all processes of the pod have the changes. It
shadows one that the machine has. A pod without changes has none, and runs the code as it is.
"""

import fcntl
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

Patch = Callable[[ModuleType], None]


def customization(layers: int | None, share: float, locks: Path) -> str:
    """The text of a sitecustomize.py; the arguments are those of `install`."""
    return (
        f"from tests.fakes.pod_overrides import install\n\ninstall({layers!r}, {share!r}, {str(locks)!r})\n"
    )


def install(layers: int | None, share: float, locks: str) -> None:
    """Make the modules that this process will import have the changes.

    `layers`: of the student; None leaves it whole. `share`: of a GPU's memory that the pod's engines plan
    with. `locks`: a folder that all pods share.
    """
    patches: dict[str, Patch] = {}
    if layers is not None:
        patches["vpmoe.model.shapes"] = lambda module: shorten(module, layers)
    if share < 1:
        patches["torch.cuda"] = lambda module: shrink_card(module, share)
        patches["vllm.entrypoints.llm"] = lambda module: shrink_engines(module, share, locks)
    sys.meta_path.insert(0, PatchingFinder(patches))


class PatchingFinder(MetaPathFinder):
    """Finds the modules of `patches` where they are, and patches each after it was executed."""

    def __init__(self, patches: dict[str, Patch]) -> None:
        self._patches = patches

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = self._patches.get(name)
        spec = PathFinder.find_spec(name, path, target) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch  # of this module's loader alone
        return spec


def shorten(module: Any, layers: int) -> None:
    """vpmoe.model.shapes: every shape has at most `layers` layers, its first ones, and vpmoe.api.memory
    counts as many."""
    from vpmoe.api.memory import STUDENTS

    for name, shape in module.SHAPES.items():
        module.SHAPES[name] = replace(shape, layers=min(shape.layers, layers))
        STUDENTS[name] = module.SHAPES[name].size()


def shrink_card(module: Any, share: float) -> None:
    """torch.cuda: the properties of a GPU have a share of its memory, from which engines plan theirs."""
    whole = module.get_device_properties

    class Properties:
        def __init__(self, found: Any) -> None:
            self._found = found
            self.total_memory = int(found.total_memory * share)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._found, name)

    module.get_device_properties = lambda *device, **named: Properties(whole(*device, **named))


def shrink_engines(module: Any, share: float, locks: str) -> None:
    """vllm.entrypoints.llm: an engine takes its share of the memory that vLLM may use.

    vLLM measures what an engine needs by what the whole GPU has free before and after. So no other engine
    on the GPU allocates meanwhile, unless each has been told the size of its cache.
    """
    start = module.LLM.__init__

    def start_alone(engine: Any, *arguments: Any, **options: Any) -> None:
        if "gpu_memory_utilization" in options:  # not on the CPU
            options["gpu_memory_utilization"] *= share
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        with (Path(locks) / f"gpu-{gpu}.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH if "kv_cache_memory_bytes" in options else fcntl.LOCK_EX)
            start(engine, *arguments, **options)

    module.LLM.__init__ = start_alone
