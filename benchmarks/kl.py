"""Time and memory of the TeacherForced loss and of log p alone, compared with eager torch and fused kernels.

    python -m benchmarks.kl [--tokens N] [--hidden H] [--teacher G] [--vocabulary 201088] [--repeats 10]
        [--device cuda]

Without --tokens it measures two sizes, both with a teacher of width 2,880: 8,192 tokens of a student of width
1,024, and 4,096 tokens of a student of width 2,880.

KL: forward and backward of cross-entropy, KL and cosine. Floor: the four matrix products that every
implementation needs (student's logits, teacher's logits, gradient of hidden, gradient of the matrix).
"in training" adds the matrices' gradients to fp32 buffers in the forward, as a stage does; only on a GPU.
log p: forward only. Floor: its one product. Peers that cannot be imported are skipped. Memory is what is
allocated beyond the inputs and the requested gradients: on a GPU the allocator's peak, on a CPU the largest
single result; in training, of the forward, beyond the buffers. On a GPU in bf16; with --device cpu in fp32,
where these sizes take minutes (try --tokens 256).
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
"""The defaults of a TeacherForced stage's loss. Not imported from vpmoe.api, so that the benchmark runs on a
machine without pydantic."""
SIZES = ((8192, 1024, 2880), (4096, 2880, 2880))
"""(tokens, width of the student, width of the teacher)."""


class Inputs(NamedTuple):
    """The inputs of the losses: the arguments of forced_loss up to the targets."""

    hidden: Tensor
    output: Tensor
    projection: Tensor | None
    teacher: Teacher
    targets: Tensor

    def leaves(self) -> list[Tensor]:
        """The tensors that get gradients."""
        return [leaf for leaf in self[:3] if leaf is not None]


def inputs(tokens: int, hidden: int, teacher: int, vocabulary: int, device: torch.device) -> Inputs:
    """Random inputs, scaled so that the logits are about as large as those of trained models."""
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


def ours(given: Inputs, *, final: bool = False) -> Tensor:
    share = torch.full((len(given.targets),), 1 / len(given.targets), device=given.targets.device)
    rows = torch.arange(len(given.targets), device=given.targets.device)
    return forced_loss(*given, share, TERMS, rows, final=final).loss  # type: ignore[arg-type]


def print_training(given: Inputs, floor: float, repeats: int) -> None:
    """Measure and print the row "in training"."""
    matrices = given.leaves()[1:]
    for matrix in matrices:
        matrix.main_grad = torch.zeros_like(matrix, dtype=torch.float32)  # type: ignore[attr-defined]

    def step() -> None:
        torch.autograd.grad(ours(given, final=True), given.leaves())

    def forward() -> None:
        ours(given, final=True)

    print_row("forced_loss in training", floor, step, given, repeats, given.hidden.nbytes, forward)
    for matrix in matrices:
        del matrix.main_grad  # type: ignore[attr-defined]


def eager(given: Inputs) -> Tensor:
    """All three terms with torch's functions and logits in fp32."""
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
    """A function of another package; None if it cannot be imported."""
    try:
        found: Callable[..., Tensor] = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    return found


def liger(function: Callable[..., Tensor], given: Inputs) -> Tensor:
    """Liger's fused linear JSD at β = 0, which is the KL alone, without cross-entropy and cosine."""
    return function(given.hidden, given.output, *given.teacher, None, 0.0, -100, TERMS.temperature)


def products(given: Inputs, repeats: int) -> tuple[float, float]:
    """(milliseconds of the four matrix products of the KL, of the one product of log p)."""
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


def print_row(
    name: str,
    floor: float,
    action: Callable[[], object],
    given: Inputs,
    repeats: int,
    gradients: int = 0,
    holds: Callable[[], object] | None = None,
) -> None:
    """Measure an implementation and print its row. `gradients`: bytes of the gradients that it returns.
    `holds`: what memory is measured of, if not of `action`."""
    device = given.hidden.device
    try:
        took, memory = milliseconds(action, repeats, device), mebibytes(holds or action, device)
    except torch.OutOfMemoryError:
        print(f"  {name:28} does not fit")
        return
    if device.type == "cuda":
        memory -= gradients / 2**20
    print(f"  {name:28} {took:9.1f} ms  {took / floor:5.2f} × the floor  {memory:9.0f} MiB", flush=True)


def measure(given: Inputs, repeats: int) -> None:
    """Measure all implementations on these inputs and print the two tables."""
    four, one = products(given, repeats)
    tokens, hidden = given.hidden.shape
    print(
        f"{tokens} tokens, hidden {hidden}, teacher {given.teacher.hidden_TG.shape[1]}, "
        f"vocabulary {len(given.output)}, {given.hidden.dtype}, {given.hidden.device}"
    )
    losses: dict[str, Callable[[Inputs], Tensor]] = {"forced_loss": ours, "eager torch": eager}
    if jsd := imported("liger_kernel.transformers.functional", "liger_fused_linear_jsd"):
        losses["Liger fused linear KL"] = lambda given: liger(jsd, given)
    print(f" KL; floor (four products) {four:.1f} ms")
    for name, loss in losses.items():

        def step(loss: Callable[[Inputs], Tensor] = loss) -> None:
            torch.autograd.grad(loss(given), given.leaves(), allow_unused=True)

        print_row(name, four, step, given, repeats, sum(leaf.nbytes for leaf in given.leaves()))
        if loss is ours and given.hidden.is_cuda:
            print_training(given, four, repeats)
    print(f" log p; floor (one product) {one:.1f} ms")
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
        print_row(name, one, score, given, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "tokens": None,
        "hidden": 1024,
        "teacher": 2880,
        "vocabulary": 201_088,
        "repeats": 10,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    for tokens, hidden, teacher in [(args.tokens, args.hidden, args.teacher)] if args.tokens else SIZES:
        measure(inputs(tokens, hidden, teacher, args.vocabulary, device), args.repeats)


if __name__ == "__main__":
    main()
