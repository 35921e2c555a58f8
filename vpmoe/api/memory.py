"""Memory that training takes on each GPU, as far as the specification decides it: what runtime.gpuMemory is
compared with, and what `vpmoe plan` shows.

Integer arithmetic, the same in Python and in CEL. Weights, gradients and optimizer state are exact, the rest
is an estimate. Without CONTEXT it gives 57.1 GiB where PyTorch had 57 at its peak (vpmoe-6b, 4 H100,
sequences of 8,192 tokens) and 63.1 where it had 61 (of 32,768). Measured without the parts of
vpmoe.model.shapes, which by the same arithmetic change it by 0.1 GiB.
"""

from dataclasses import dataclass

from vpmoe.api.card import GIB
from vpmoe.api.layout import ranks
from vpmoe.api.stages import StageFields
from vpmoe.api.student import StudentSpec

VOCABULARY = 201_088
MICROBATCH = 8192
"""Positions of one microbatch, rounded down to whole sequences; a longer sequence is one of its own."""
HEAD_CHUNK = 2669
"""Positions whose logits the loss head holds at the same time: 2 GiB in fp32."""
CONTEXT = 8 * GIB
"""Memory outside PyTorch: the CUDA context, kernels and NCCL's buffers, and what the allocator cannot use.
Measured with 2 and with 4 ranks."""

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12
"""Bytes of a parameter: the weight in bf16 and the gradient in fp32 on every rank; fp32 weight and two Adam
moments on one of the ranks."""
MAIN_WEIGHT = 4
"""Bytes of the fp32 weight."""


@dataclass(frozen=True)
class StudentSize:
    """The numbers of a student's shape (vpmoe.model.shapes) that decide how much memory it takes; a test
    compares the two."""

    parameters: int
    expert_parameters: int
    """Those of the experts, which expert parallelism divides. Part of `parameters`."""
    hidden: int
    saved: int
    """Bytes of a position that a forward keeps for the backward."""
    layer: int
    """Bytes of a position inside one layer, values and gradients."""
    cached: int
    """Bytes of a position's keys and values in a sampler, in the layers that keep those of all positions."""
    window: int
    """Bytes of a sequence's keys and values in a sampler, in the layers that keep those of a window."""

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights and both moments in fp32."""
        return OPTIMIZER * self.parameters

    @property
    def main_weights(self) -> int:
        """Bytes of the weights alone in fp32: of initial weights."""
        return MAIN_WEIGHT * self.parameters

    @property
    def weights(self) -> int:
        """Bytes of the weights alone in bf16: of a policy version, and of the exported model."""
        return WEIGHT * self.parameters

    @property
    def head(self) -> int:
        """Bytes of the loss head: logits of a chunk in fp32, their gradient in bf16; the matrix's gradient in
        fp32, and twice in bf16."""
        return HEAD_CHUNK * VOCABULARY * 6 + VOCABULARY * self.hidden * 8


STUDENTS = {
    "vpmoe-6b": StudentSize(6_029_894_927, 5_324_898_304, 1024, 164_352, 93_344, 20_480, 7_864_320),
    "tiny": StudentSize(26_011_264, 134_144, 64, 14_544, 5_792, 128, 65_536),
}
"""Size of each shape of student.shape."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each GPU that trains, by item."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    context: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.context


def training_memory(
    size: StudentSize, ranks: int, expert_parallel: int, sequence_length: int
) -> TrainingMemory:
    """Memory of one of `ranks` GPUs, of which `expert_parallel` share a set of experts."""
    held = size.parameters - size.expert_parameters + size.expert_parameters // expert_parallel
    return TrainingMemory(
        weights=WEIGHT * held,
        gradients=GRADIENT * held,
        optimizer=OPTIMIZER * size.parameters // ranks,
        activations=(size.saved + size.layer + 4 * size.hidden) * microbatch(sequence_length),
        head=size.head,
        context=CONTEXT,
    )


def microbatch(sequence_length: int) -> int:
    """Positions of one microbatch."""
    return max(1, MICROBATCH // sequence_length) * sequence_length


def stage_memory(student: StudentSpec, stage: StageFields, sequence_length: int) -> TrainingMemory:
    """Memory of each GPU that trains in a stage. The stage needs at least one rank."""
    return training_memory(
        STUDENTS[student.shape], ranks(student, stage), student.expert_parallel, sequence_length
    )


def cel_training_memory(shape: str, ranks: str, expert_parallel: str, sequence_length: str) -> str:
    """CEL for the total of training_memory. All arguments are CEL."""
    share = WEIGHT + GRADIENT
    positions = (
        f"({sequence_length} < {MICROBATCH} ? {MICROBATCH} / {sequence_length} * {sequence_length} : "
        f"{sequence_length})"
    )
    last, *others = [
        f"{share * (size.parameters - size.expert_parameters) + size.head + CONTEXT} + "
        f"{size.expert_parameters} / {expert_parallel} * {share} + {OPTIMIZER * size.parameters} / {ranks} + "
        f"{size.saved + size.layer + 4 * size.hidden} * {positions}"
        for size in reversed(STUDENTS.values())
    ]
    text = last
    for name, other in zip(list(STUDENTS)[-2::-1], others, strict=True):
        text = f"{shape} == '{name}' ? {other} : {text}"
    return f"({text})"
