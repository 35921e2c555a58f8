"""One step of a student with given weights, choices of experts and documents: on a GPU and on the CPU.

    python -m tests.fakes.student_step FILE

reads a Step from FILE, computes it in float32 on the CPU, whatever GPUs the machine has, and writes its
Result over it. A process has one device, because megatron-core is patched for the CPU.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vpmoe.model.batch import Batch
from vpmoe.model.head import head_loss
from vpmoe.model.shapes import Shape
from vpmoe.model.student import Student, build

ROOT = Path(__file__).parents[2]


@dataclass
class Step:
    """What a step depends on. `choices`: the experts that each mixture layer chose, because a rounding error
    that changes one choice changes everything after it; None to let the routers choose."""

    shape: Shape
    weights: dict[str, Tensor]
    rows: tuple[Tensor, ...]
    coefficient_T: Tensor
    choices: list[Tensor] | None = None


@dataclass
class Result:
    hidden_TH: Tensor
    logp_T: Tensor
    gradients: dict[str, Tensor]
    choices: list[Tensor]
    """[N, K] of each mixture layer."""

    def to_cpu(self) -> "Result":
        return Result(
            self.hidden_TH.cpu(),
            self.logp_T.cpu(),
            {name: gradient.cpu() for name, gradient in self.gradients.items()},
            [choice.cpu() for choice in self.choices],
        )


@torch.no_grad()
def copy_weights(weights: dict[str, Tensor], student: Student) -> None:
    for name, parameter in student.named_parameters():
        parameter.copy_(weights[name])


def compute(student: Student, step: Step, device: torch.device) -> Result:
    """The step with the student's own weights."""
    chosen = _Choices(student, step.choices)
    batch = Batch.from_rows(*step.rows).to(device)
    coefficient_T = step.coefficient_T.to(device)
    hidden = student(batch)
    loss, logp_T = head_loss(
        hidden, student.output, batch.target, lambda logp_t, rows_t: coefficient_T[rows_t]
    )
    loss.backward()
    gradients = {}
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        gradients[name], parameter.grad = parameter.grad, None
    return Result(hidden.detach(), logp_T, gradients, chosen.remove())


class _Choices:
    """Records the routers' choices of a student, or imposes given ones (on the CPU)."""

    def __init__(self, student: Student, given: list[Tensor] | None) -> None:
        self.routers = [layer.mlp.router for layer in student.decoder.layers if hasattr(layer.mlp, "router")]
        self.made: list[list[Tensor]] = [[] for _ in self.routers]
        self.hooks = []
        for number, (router, made) in enumerate(zip(self.routers, self.made, strict=True)):
            self.hooks.append(
                router.register_forward_hook(
                    lambda module, inputs, output, made=made: made.append(output[1].detach().long())
                )
            )
            if given is not None:
                router.router_replay = _Replay(given[number])

    def remove(self) -> list[Tensor]:
        """The choices of the first forward."""
        for router, hook in zip(self.routers, self.hooks, strict=True):
            router.router_replay = None
            hook.remove()
        return [made[0] for made in self.made]


class _Replay:
    """megatron's interface for it (RouterReplay), without its global list."""

    def __init__(self, given: Tensor) -> None:
        self.given = given

    def get_replay_topk(self, scores, topk, groups, group_topk, choose):  # type: ignore[no-untyped-def]
        return scores.gather(1, self.given), self.given


def on_cpu(step: Step, folder: Path) -> Result:
    """The step in float32 on the CPU, in a process of its own."""
    file = folder / "step.pt"
    torch.save(step, file)
    subprocess.run(
        [sys.executable, "-m", "tests.fakes.student_step", file],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        check=True,
    )
    result = torch.load(file, weights_only=False)
    assert isinstance(result, Result)
    return result


def main(file: Path) -> None:
    from vpmoe.model import device as devices
    from vpmoe.model import distributed

    device = devices.choose()
    distributed.start(device)
    step = torch.load(file, weights_only=False, map_location=device)
    student = build(step.shape, device, sequence_length=4096, seed=0)
    copy_weights(step.weights, student)
    torch.save(compute(student, step, device), file)
    distributed.stop()


if __name__ == "__main__":
    # the classes of the pickled objects are in the module of this name, not in __main__
    from tests.fakes.student_step import main as run

    run(Path(sys.argv[1]))
