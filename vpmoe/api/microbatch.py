"""The trainer's microbatch, chosen by arithmetic: as many sequences as the card holds, as little recomputed
as it allows, and gradients sharded where nothing else fits as well.

`vpmoe plan` and the trainer call `choose`. An attempt stores what was chosen in the train state, so that a
later one keeps it, whatever its card is.

The rule: the least time a token, counted in the time of a token of a long microbatch without recomputation,

    Σ over a rank's microbatches of (positions · (1 + recomputed layers / (3 · layers)) + FIXED [+ SCATTERED])

for the tokens of one optimizer step. A forward is a third of the arithmetic of forward and backward, so
recomputing all layers costs a third more. FIXED is what a microbatch costs however short it is, and a third
more arithmetic is worth that only in very short ones: 2 × 16,384 positions without recomputation
(1 + 4,096 / 16,384 = 1.25) go before 32,768 with it (1.33 + 0.13 = 1.46), and 8,192 without it (1.5) before
16,384 with it (1.58). Of equals the shorter one is taken, which needs less memory.
"""

from functools import cache
from typing import Annotated

from pydantic import Field

from vpmoe.api.base import Record
from vpmoe.api.layout import layout, ranks
from vpmoe.api.memory import (
    GRADIENT,
    STUDENTS,
    StudentSize,
    TrainingMemory,
    least_memory,
    least_rows,
    training_memory,
)
from vpmoe.api.spec import Spec
from vpmoe.api.stages import StageFields

MOST = 32_768
"""Positions of the longest microbatch, unless one sequence is longer. A longer one would save less than an
eighth of its time, FIXED / MOST, and none was measured."""
FIXED = 4096
"""Tokens in whose time a GPU does what a microbatch costs however short it is: it reads and writes weights
and gradients (of vpmoe-6b some 100 GB, 25 to 40 ms where a token takes 11 µs) and waits for launches. An
estimate; `benchmarks.step --sweep` shows the times that it stands for."""
SCATTERED_BYTES = 4_000_000
"""Bytes of gradients that a GPU sends in the time of a token: NVLink at 250 GB/s and 16 µs, both assumed.
Sharded gradients are summed over the ranks after every microbatch instead of after the last one. That it
happens beside the backward is not counted."""


class Microbatch(Record):
    """How a stage's trainer divides a rank's sequences, and what it recomputes."""

    rows: Annotated[int, Field(ge=1)]
    """Sequences of a microbatch, except the last ones of a step."""
    recomputed_layers: Annotated[int, Field(ge=0)] = 0
    """The first layers, whose activations are computed again in the backward."""
    sharded_gradients: bool = False
    """Whether each rank keeps the sums of its share of the gradients only."""
    few_shapes: bool = False
    """Whether all microbatches have one of `shapes` rows, for which some are padded; otherwise the last one
    has the rows that are left."""

    @property
    def shapes(self) -> list[int]:
        """The numbers of rows that a microbatch can have, the largest first: `rows`, halved until one is
        left."""
        found = [self.rows]
        while found[-1] > 1:
            found.append(-(-found[-1] // 2))
        return found

    def sizes(self, rows: int, sequence_length: int) -> list[int]:
        """The rows of each microbatch of a rank that has `rows`, in order. Their sum is `rows`, or more by
        rows of padding, at the end. Other ranks with as many rows get the same.

        What is left after the whole microbatches is padded to one of the shapes if that takes less time than
        one more microbatch.
        """
        whole, left = divmod(rows, self.rows)
        if not left or not self.few_shapes:
            return [self.rows] * whole + [left] * bool(left)
        return [self.rows] * whole + list(_rest(left, tuple(self.shapes), sequence_length)[1])


@cache
def _rest(rows: int, shapes: tuple[int, ...], sequence_length: int) -> tuple[int, tuple[int, ...]]:
    """(time in tokens, sizes) of the fastest microbatches for `rows`, at most the first of the shapes, the
    larger ones first."""
    if not rows:
        return 0, ()
    ways = []
    for number, shape in enumerate(shapes):
        time, sizes = _rest(max(0, rows - shape), shapes[number:], sequence_length)
        ways.append((shape * sequence_length + FIXED + time, (shape, *sizes)))
    return min(ways)


def on_cpu(sequence_length: int) -> Microbatch:
    """The microbatch where no card limits it: the shortest one, without padding."""
    return Microbatch(rows=least_rows(sequence_length))


def choose(
    size: StudentSize,
    card: int,
    *,
    ranks: int,
    expert_parallel: int,
    sequence_length: int,
    sequences: int,
    teacher_width: int | None = None,
) -> Microbatch | None:
    """The fastest microbatch that a card of `card` bytes holds, by this module's rule; None if it does not
    hold the least that training takes (memory.least_memory).

    `sequences` are those of a rank in one optimizer step; `teacher_width` as in memory.training_memory. The
    card holds what it returns: see `memory_of`.
    """
    least = least_rows(sequence_length)
    if least_memory(size, ranks, expert_parallel, sequence_length, teacher_width).total > card:
        return None
    found: list[tuple[int, Microbatch]] = []
    rows = least
    while rows == least or (rows * sequence_length <= MOST and rows <= sequences):
        for sharded in (False, True) if ranks > 1 and size.shards else (False,):
            for recomputed in range(size.layers + 1):
                one = Microbatch(
                    rows=rows, recomputed_layers=recomputed, sharded_gradients=sharded, few_shapes=True
                )
                memory = memory_of(one, size, ranks, expert_parallel, sequence_length, teacher_width)
                if memory.total <= card:
                    found.append((_time(one, size, ranks, sequence_length, sequences), one))
                    break
        rows *= 2
    return min(found, key=lambda each: each[0])[1]


def memory_of(
    microbatch: Microbatch,
    size: StudentSize,
    ranks: int,
    expert_parallel: int,
    sequence_length: int,
    teacher_width: int | None = None,
) -> TrainingMemory:
    """Memory of one of `ranks` GPUs with this microbatch."""
    return training_memory(
        size,
        ranks,
        expert_parallel,
        microbatch.rows * sequence_length,
        microbatch.recomputed_layers,
        microbatch.sharded_gradients,
        teacher_width,
    )


def choose_for_stage(
    spec: Spec, stage: StageFields, card: int, teacher_width: int | None
) -> Microbatch | None:
    """`choose` for a stage of a run."""
    return choose(
        STUDENTS[spec.student.shape],
        card,
        ranks=ranks(spec.student, stage),
        expert_parallel=spec.student.expert_parallel,
        sequence_length=spec.training.sequence_length,
        sequences=layout(spec.student, spec.training, stage).sequences_per_rank,
        teacher_width=teacher_width,
    )


def memory_of_stage(
    microbatch: Microbatch, spec: Spec, stage: StageFields, teacher_width: int | None
) -> TrainingMemory:
    """`memory_of` a stage of a run."""
    return memory_of(
        microbatch,
        STUDENTS[spec.student.shape],
        ranks(spec.student, stage),
        spec.student.expert_parallel,
        spec.training.sequence_length,
        teacher_width,
    )


def least_for_stage(spec: Spec, stage: StageFields) -> Microbatch:
    """The microbatch that takes the least memory, which memory.least_memory counts."""
    size = STUDENTS[spec.student.shape]
    return Microbatch(
        rows=least_rows(spec.training.sequence_length),
        recomputed_layers=size.layers,
        sharded_gradients=ranks(spec.student, stage) > 1 and size.shards,
        few_shapes=True,
    )


def time_of_stage(microbatch: Microbatch, spec: Spec, stage: StageFields, sequences: int) -> float:
    """Time of a rank's microbatches of a step with `sequences` sequences, by the rule: in tokens."""
    size = STUDENTS[spec.student.shape]
    world = ranks(spec.student, stage)
    return _time(microbatch, size, world, spec.training.sequence_length, sequences) / (3 * size.layers)


def _time(one: Microbatch, size: StudentSize, ranks: int, sequence_length: int, sequences: int) -> int:
    """Time of a rank's microbatches of a step, by the rule: in tokens, times 3 · layers."""
    whole, left = divmod(max(1, sequences), one.rows)
    rest = one.sizes(left, sequence_length)
    fixed = FIXED
    if one.sharded_gradients:
        fixed += GRADIENT * size.parameters * (ranks - 1) // ranks // SCATTERED_BYTES
    positions = (whole * one.rows + sum(rest)) * sequence_length
    microbatches = whole + len(rest)
    return positions * (3 * size.layers + one.recomputed_layers) + 3 * size.layers * fixed * microbatches
