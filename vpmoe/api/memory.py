"""Memory that training takes on each GPU, as far as the specification decides it: what runtime.gpuMemory is
compared with, what `vpmoe plan` shows, and what the trainer's microbatch is chosen by (microbatch.py).

Integer arithmetic, the same in Python and in CEL. Weights, gradients and optimizer state are exact; what a
layer keeps is counted tensor by tensor (vpmoe.model.shapes); the rest is an estimate. `benchmarks.step`
prints it beside the peak that PyTorch had. Without CONTEXT, of which PyTorch knows nothing."""

from dataclasses import dataclass

from vpmoe.api.card import GIB
from vpmoe.api.layout import ranks
from vpmoe.api.stages import StageFields
from vpmoe.api.student import StudentSpec

VOCABULARY = 201_088
LEAST = 8192
"""Positions of the shortest microbatch, rounded down to whole sequences; a longer sequence is one of its
own."""
HEAD_CHUNK = 2502
"""Positions of which a loss head holds a number for each logit at the same time: 960 MiB in 16 bits."""
CONTEXT = 10 * GIB
"""Memory outside PyTorch: the CUDA context, kernels and NCCL's buffers; and what the allocator cannot use.
8.9 and 1.0 GiB with expandable segments and CUDA graphs, with one rank and with two on H200s."""

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12
"""Bytes of a parameter: the weight in bf16 on every rank; the gradient in fp32 on every rank, or if gradients
are sharded on one of the ranks; fp32 weight and two Adam moments on one of the ranks."""
MAIN_WEIGHT = 4
"""Bytes of the fp32 weight."""
BUCKET = 80_000_000
"""Most gradients of two of megatron's buckets, without a matrix of the vocabulary's size: a bucket is full
from 40 million on."""


@dataclass(frozen=True)
class StudentSize:
    """The numbers of a student's shape (vpmoe.model.shapes) that decide how much memory it takes; a test
    compares the two."""

    parameters: int
    expert_parameters: int
    """Those of the experts, which expert parallelism divides. Part of `parameters`."""
    layers: int
    hidden: int
    kept: int
    """Bytes of a position that a layer keeps for the backward if it is not recomputed: those of the mean
    layer. A recomputed layer keeps its input, in bf16."""
    stem: int
    """Bytes of a position that are kept once."""
    backward: int
    """Bytes of a position that a layer's backward holds beside what was kept."""
    backward_weights: int
    """Bytes that it holds whatever the positions; expert parallelism divides them."""
    graphed: int
    """Bytes of a position that CUDA graphs of the layers hold beside that: their inputs, at fixed
    addresses."""
    shared: int
    """Bytes that a layer keeps of a position of each other rank that shares its experts, with expert
    parallelism."""
    shared_backward: int
    """Bytes of such a position that a layer's backward holds beside what was kept."""
    cached: int
    """Bytes of a position's keys and values in a sampler, in the layers that keep those of all positions."""
    window: int
    """Bytes of a sequence's keys and values in a sampler, in the layers that keep those of a window."""

    @property
    def forward(self) -> int:
        """Bytes of a position that a layer's forward holds in vLLM, at most: what it would hold for a
        backward, too."""
        return self.kept + self.backward

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
        """Bytes of the loss head: the gradient of a chunk's logits in bf16, or beside a teacher both models'
        logits."""
        return HEAD_CHUNK * VOCABULARY * 2

    @property
    def output_gradient(self) -> int:
        """Bytes of the output matrix's gradient. The loss head adds to it during the forward, so if gradients
        are sharded, it has memory from then on."""
        return GRADIENT * VOCABULARY * self.hidden

    @property
    def input(self) -> int:
        """Bytes of a position that a recomputed layer keeps."""
        return 2 * self.hidden

    @property
    def buckets(self) -> int:
        """Bytes of the whole gradients that a rank holds at a time if gradients are sharded: the bucket of
        the embeddings or the output matrix, and two others."""
        return self.output_gradient + GRADIENT * BUCKET

    @property
    def shards(self) -> bool:
        """Whether two ranks need less memory with sharded gradients."""
        return GRADIENT * self.parameters // 2 > self.buckets


STUDENTS = {
    "vpmoe-6b": StudentSize(
        6_029_894_927,
        5_324_898_304,
        80,
        1024,
        20_053,
        7214,
        17_424,
        134_217_728,
        4617,
        1104,
        11_280,
        20_480,
        7_864_320,
    ),
    "tiny": StudentSize(26_011_264, 134_144, 5, 64, 1783, 558, 904, 65_536, 329, 168, 520, 128, 65_536),
}
"""Size of each shape of student.shape."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each GPU that trains, by item."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward keeps for the backward."""
    head: int
    """The loss head at the end of the forward, or a layer's backward where that needs more; with CUDA graphs
    the two together, because the graphs' memory is their own."""
    context: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.context


def training_memory(
    size: StudentSize,
    ranks: int,
    expert_parallel: int,
    positions: int,
    recomputed_layers: int,
    sharded_gradients: bool,
    teacher_width: int | None = None,
    graphs: bool = True,
) -> TrainingMemory:
    """Memory of one of `ranks` GPUs, of which `expert_parallel` share a set of experts, with microbatches of
    `positions` positions, of whose layers the first `recomputed_layers` are recomputed.

    `teacher_width` is that of the hidden states of a teacher beside the students, in a TeacherForced stage:
    such a stage also holds the teacher's output matrix and its hidden states of a microbatch, and trains a
    projection to its width, which has a gradient of the hidden states' size. `graphs`: whether layers are
    CUDA graphs where they can be, with whole gradients (vpmoe/model/layer_graphs.py).
    """
    held = size.parameters - size.expert_parameters + size.expert_parameters // expert_parallel
    kept = size.layers - recomputed_layers
    others = expert_parallel - 1
    each = size.kept + size.shared * others
    backward = (size.backward + size.shared_backward * others) * positions
    backward += size.backward_weights // expert_parallel
    if not kept:
        backward += each * positions
    head = size.head
    if sharded_gradients:
        backward += size.buckets
        head += size.output_gradient
    head = max(head, backward)
    if graphs and not sharded_gradients:
        head = size.head + backward + size.graphed * positions
    width = teacher_width or 0
    projection = width * size.hidden if width != size.hidden else 0
    return TrainingMemory(
        weights=WEIGHT * (held + projection),
        gradients=(GRADIENT * size.parameters // ranks if sharded_gradients else GRADIENT * held)
        + GRADIENT * projection,
        optimizer=OPTIMIZER * (size.parameters + projection) // ranks,
        activations=(size.stem + size.input * recomputed_layers + each * kept + 4 * width) * positions,
        head=head + WEIGHT * VOCABULARY * width,
        context=CONTEXT,
    )


def least_rows(sequence_length: int) -> int:
    """Sequences of the shortest microbatch."""
    return max(1, LEAST // sequence_length)


def least_memory(
    size: StudentSize,
    ranks: int,
    expert_parallel: int,
    sequence_length: int,
    teacher_width: int | None = None,
) -> TrainingMemory:
    """The least memory that training takes: the shortest microbatch, every layer recomputed, and gradients
    sharded where that helps."""
    return training_memory(
        size,
        ranks,
        expert_parallel,
        least_rows(sequence_length) * sequence_length,
        size.layers,
        ranks > 1 and size.shards,
        teacher_width,
    )


def stage_memory(student: StudentSpec, stage: StageFields, sequence_length: int) -> TrainingMemory:
    """The least memory of each GPU that trains in a stage, without what a teacher needs. The stage needs at
    least one rank."""
    return least_memory(
        STUDENTS[student.shape], ranks(student, stage), student.expert_parallel, sequence_length
    )


def cel_least_memory(shape: str, ranks: str, expert_parallel: str, sequence_length: str) -> str:
    """CEL for the total of least_memory. All arguments are CEL. `p` are the positions of a microbatch."""
    positions = (
        f"({sequence_length} < {LEAST} ? {LEAST} / {sequence_length} * {sequence_length} : {sequence_length})"
    )

    def total(size: StudentSize, sharded: bool) -> str:
        share = WEIGHT if sharded else WEIGHT + GRADIENT
        of_other = size.shared + size.shared_backward
        each = size.kept + size.backward - of_other + (0 if sharded else size.graphed)
        backward = (
            f"{size.backward_weights} / {expert_parallel} + {each} * p + {of_other} * p * {expert_parallel}"
        )
        if sharded:
            alone, backward = size.head + size.output_gradient, f"{size.buckets} + {backward}"
            head = f"({backward} > {alone} ? {backward} : {alone})"
        else:
            head = f"{size.head} + {backward}"
        terms = [
            f"{share * (size.parameters - size.expert_parameters) + CONTEXT}",
            f"{size.expert_parameters} / {expert_parallel} * {share}",
            f"{OPTIMIZER * size.parameters} / {ranks}",
            f"{size.stem + size.input * size.layers} * p",
            head,
        ]
        if sharded:
            terms.append(f"{GRADIENT * size.parameters} / {ranks}")
        return " + ".join(terms)

    def of_shape(size: StudentSize) -> str:
        whole = total(size, sharded=False)
        return f"({ranks} > 1 ? {total(size, sharded=True)} : {whole})" if size.shards else whole

    last, *others = [of_shape(size) for size in reversed(STUDENTS.values())]
    text = last
    for name, other in zip(list(STUDENTS)[-2::-1], others, strict=True):
        text = f"{shape} == '{name}' ? {other} : {text}"
    return f"[{positions}].map(p, {text})[0]"
