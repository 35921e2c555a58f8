"""The head of teacher-forced training and log p alone, beside eager torch, their peers and their floors, in
the same run.

    python -m benchmarks.kl [--tokens N] [--hidden H] [--teacher G] [--vocabulary 201088] [--repeats 10]

Without --tokens: 8,192 tokens of a student 1,024 wide and 4,096 of one 2,880 wide, the teacher 2,880 wide.
KL: forward and backward of the cross-entropy, KL and cosine of TeacherForced, against the four matrix
products that none can do without (student's logits, teacher's logits, hidden's gradient, the matrix's). log
p: without gradients, against its one product. Memory is what is allocated beyond inputs and the gradients
that are asked for: the allocator's peak on a GPU, the largest single result elsewhere. Peers are timed where
they can be imported. On a GPU in bf16 unless CUDA_VISIBLE_DEVICES is set and empty, then in fp32 (with fewer
tokens, or be patient).
"""

import argparse
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.head import mebibytes, milliseconds
from vpmoe.model.head import target_logp
from vpmoe.objectives.teacher_forced_head import Teacher, forced_loss

TERMS = SimpleNamespace(ce=0.2, kl=0.2, hidden=0.6, temperature=2.0)
"""The defaults of a TeacherForced stage's loss. vpmoe.api would want pydantic, which a machine with a GPU may
not have."""
SIZES = ((8192, 1024, 2880), (4096, 2880, 2880))
"""Tokens, the student's width, the teacher's."""


class Inputs(NamedTuple):
    hidden: Tensor
    output: Tensor
    projection: Tensor | None
    teacher: Teacher
    targets: Tensor

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in self[:3] if leaf is not None]


def inputs(tokens: int, hidden: int, teacher: int, vocabulary: int, device: torch.device) -> Inputs:
    """Random ones, with logits of the size that trained models have."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*shape, device=device)).to(dtype)

    return Inputs(
        normal(tokens, hidden).requires_grad_(),
        normal(vocabulary, hidden, std=3 * hidden**-0.5).requires_grad_(),
        normal(teacher, hidden, std=hidden**-0.5).requires_grad_() if teacher != hidden else None,
        Teacher(normal(tokens, teacher), normal(vocabulary, teacher, std=3 * teacher**-0.5)),
        torch.randint(0, vocabulary, (tokens,), device=device),
    )


def ours(given: Inputs) -> Tensor:
    share = torch.full((len(given.targets),), 1 / len(given.targets), device=given.targets.device)
    return forced_loss(*given, share, TERMS).loss  # type: ignore[arg-type]


def eager(given: Inputs) -> Tensor:
    """All three terms in torch's own functions, logits in fp32."""
    t = TERMS.temperature
    logits, teacher = (
        (given.hidden @ given.output.T).float(),
        (given.teacher.hidden_TG @ given.teacher.output_VG.T).float(),
    )
    kl = functional.kl_div(
        (logits / t).log_softmax(1), (teacher / t).log_softmax(1), reduction="batchmean", log_target=True
    )
    projected = given.hidden if given.projection is None else given.hidden @ given.projection.T
    cosine = functional.cosine_similarity(projected.float(), given.teacher.hidden_TG.float(), dim=1).mean()
    return (
        TERMS.ce * functional.cross_entropy(logits, given.targets)
        + TERMS.kl * t**2 * kl
        + TERMS.hidden * (1 - cosine)
    )


def imported(module: str, name: str) -> Callable[..., Tensor] | None:
    """Another package's function, where it is installed."""
    try:
        found: Callable[..., Tensor] = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    return found


def liger(function: Callable[..., Tensor], given: Inputs) -> Tensor:
    """Liger's fused linear JSD at β = 0, which is the KL alone: no cross-entropy, no cosine."""
    return function(given.hidden, given.output, *given.teacher, None, 0.0, -100, TERMS.temperature)


def products(given: Inputs, repeats: int) -> tuple[float, float]:
    """Milliseconds of the head's four matrix products, and of log p's one."""
    hidden, output, teacher = given.hidden.detach(), given.output.detach(), given.teacher
    gradient = torch.randn(len(hidden), len(output), device=hidden.device, dtype=hidden.dtype)

    def four() -> None:
        torch.mm(hidden, output.T)
        torch.mm(teacher.hidden_TG, teacher.output_VG.T)
        torch.mm(gradient, output)
        torch.mm(gradient.T, hidden)

    return milliseconds(four, repeats, hidden.device), milliseconds(
        lambda: torch.mm(hidden, output.T), repeats, hidden.device
    )


def told(
    name: str, floor: float, action: Callable[[], object], given: Inputs, repeats: int, asked: int = 0
) -> None:
    """Time and memory of one of them; `asked`: bytes of the gradients that it returns."""
    device = given.hidden.device
    try:
        took, memory = milliseconds(action, repeats, device), mebibytes(action, device)
    except torch.OutOfMemoryError:
        print(f"  {name:28} does not fit")
        return
    if device.type == "cuda":
        memory -= asked / 2**20
    print(f"  {name:28} {took:9.1f} ms  {took / floor:5.2f} × the floor  {memory:9.0f} MiB", flush=True)


def measure(given: Inputs, repeats: int) -> None:
    four, one = products(given, repeats)
    tokens, hidden = given.hidden.shape
    print(
        f"{tokens} tokens, hidden {hidden}, teacher {given.teacher.hidden_TG.shape[1]}, vocabulary "
        f"{len(given.output)}, "
        f"{given.hidden.dtype}, {given.hidden.device}"
    )
    losses: dict[str, Callable[[Inputs], Tensor]] = {"forced_loss": ours, "eager torch": eager}
    if jsd := imported("liger_kernel.transformers.functional", "liger_fused_linear_jsd"):
        losses["Liger fused linear KL"] = lambda given: liger(jsd, given)
    print(f" KL; floor of its four products {four:.1f} ms")
    for name, loss in losses.items():

        def step(loss: Callable[[Inputs], Tensor] = loss) -> None:
            torch.autograd.grad(loss(given), given.leaves(), allow_unused=True)

        told(name, four, step, given, repeats, sum(leaf.nbytes for leaf in given.leaves()))
    print(f" log p; floor of its one product {one:.1f} ms")
    plain = given._replace(hidden=given.hidden.detach(), output=given.output.detach())
    scores: dict[str, Callable[[], object]] = {
        "target_logp": lambda: target_logp(plain.hidden, plain.output, plain.targets),
        "eager torch": lambda: (
            -functional.cross_entropy(
                (plain.hidden @ plain.output.T).float(), plain.targets, reduction="none"
            )
        ),
    }
    if cce := imported("cut_cross_entropy", "linear_cross_entropy"):
        scores["cut-cross-entropy"] = lambda: cce(plain.hidden, plain.output, plain.targets, reduction="none")
    for name, score in scores.items():
        told(name, one, score, given, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "tokens": None,
        "hidden": 1024,
        "teacher": 2880,
        "vocabulary": 201_088,
        "repeats": 10,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for tokens, hidden, teacher in [(args.tokens, args.hidden, args.teacher)] if args.tokens else SIZES:
        measure(inputs(tokens, hidden, teacher, args.vocabulary, device), args.repeats)


if __name__ == "__main__":
    main()
