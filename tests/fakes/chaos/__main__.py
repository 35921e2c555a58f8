"""`python -m tests.fakes.chaos SEED…`: batches of chaos by hand, each with another seed, and what they cost.

The operator's logs and the API server's are below --folder. Ends with status 1 if an invariant was broken.
"""

import argparse
import asyncio
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fakes.chaos.batch import Batch, run
from tests.fakes.control_plane import ControlPlane
from tests.fakes.hollow_node import HollowNode


@contextmanager
def plane_with_gpus(folder: Path, gpus: int) -> Iterator[ControlPlane]:
    """A control plane with one node that takes any pod. A scheduler would hide GPUs that are given twice."""
    os.environ["GOGC"] = "400"  # memory for CPU time
    try:
        with (
            ControlPlane(folder, scheduler=False) as plane,
            HollowNode(plane.kubeconfig, binds=True, capacity={"nvidia.com/gpu": f"{gpus}"}),
        ):
            yield plane
    finally:
        del os.environ["GOGC"]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.chaos", description="Chaos by hand.")
    parser.add_argument("seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument("--folder", type=Path, required=True, help="a folder that does not exist yet")
    for field in dataclasses.fields(Batch):
        if field.name != "seed":
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=type(field.default), default=field.default)
    arguments = parser.parse_args()
    broken = False
    with plane_with_gpus(arguments.folder, arguments.capacity) as plane:
        for seed in arguments.seeds:
            options = {
                f.name: getattr(arguments, f.name) for f in dataclasses.fields(Batch) if f.name != "seed"
            }
            namespace = f"chaos-{seed}"
            plane.create_namespace(namespace)
            (arguments.folder / namespace).mkdir()
            before, own = plane.usage(), os.times()
            outcome = asyncio.run(
                run(Batch(seed, **options), plane.kubeconfig, namespace, arguments.folder / namespace)
            )
            after, now = plane.usage(), os.times()
            cpu = {
                **{name: after[name] - before[name] for name in after},
                "test": now.user + now.system - own.user - own.system,
                "operators": now.children_user
                + now.children_system
                - own.children_user
                - own.children_system,
            }
            print(
                f"seed {seed}: {outcome.killed_at.total()} kills, {outcome.requests.total()} requests,"
                f" {outcome.changes} changes, {outcome.seconds:.0f} s; CPU seconds {sum(cpu.values()):.0f}:",
                ", ".join(f"{name} {seconds:.1f}" for name, seconds in cpu.items()),
                flush=True,
            )
            for line in [*outcome.violations, *outcome.timelines]:
                print("  ", line, flush=True)
            broken = broken or bool(outcome.violations)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
