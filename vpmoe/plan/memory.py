"""Memory of each GPU by role and item, beside the card's, and what does not fit.

The trainer's arithmetic is vpmoe.api.memory, which runtime.gpuMemory is checked with; its microbatch is
chosen in vpmoe.api.microbatch, by the trainer as here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from vpmoe.api.card import GIB
from vpmoe.api.layout import ranks, teacher_processes
from vpmoe.api.memory import STUDENTS
from vpmoe.api.microbatch import Microbatch, choose_for_stage, least_for_stage, memory_of_stage
from vpmoe.api.spec import Spec
from vpmoe.api.stages import StageFields
from vpmoe.plan.sampling import ENGINES, divide_card, needed_to_sample, sequence_bytes
from vpmoe.plan.scoring import (
    ENGINE,
    LEAST_TOKENS,
    TEACHER_SHARE,
    forward_tokens,
    needed_to_score,
    teacher_share,
)
from vpmoe.plan.teacher import TeacherSize

FORWARD_TOKENS = 16_384
"""Tokens of one forward of the teacher of a TeacherForced stage: teacher_hidden.FORWARD_TOKENS."""
ANSWERS = 3
"""Copies of hidden states that such a teacher holds: those of a forward, placed, and on their way."""


@dataclass(frozen=True)
class MicrobatchPlan:
    """A trainer's microbatch."""

    positions: int
    sequences: int
    recomputed_layers: int
    """Layers whose activations are computed again in the backward."""
    layers: int
    sharded_gradients: bool
    """Whether each rank keeps its share of the gradients only."""


@dataclass(frozen=True)
class RoleMemory:
    """Memory of each GPU of one role."""

    step: str
    role: str
    """train, sampler, teacher or evaluate."""
    gpus: int
    items: Mapping[str, int]
    """Bytes by item (ITEMS)."""
    card: int
    needed: int
    """Bytes that a card must have."""
    engines: int = 1
    """Processes on each GPU. `items` are of all."""
    sequences: int | None = None
    """Of the student in vLLM: sequences of the longest length in the cache of each engine."""
    microbatch: MicrobatchPlan | None = None
    """The trainer's: the one that needs the least memory if none fits. None for the other roles."""

    ITEMS: ClassVar = ("weights", "gradients", "optimizer", "activations", "logits", "cache", "context")

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.card


def memory_by_role(spec: Spec, card: int, teacher: TeacherSize | None) -> list[RoleMemory]:
    """The memory of every role that the run has. The teacher's is left out if its size is not known."""
    found = [training_role(spec, stage, card, teacher) for stage in spec.stages]
    for stage in spec.stages:
        if stage.samples:
            found.append(sampling_engines(spec, stage, card))
    if teacher is not None:
        found += teacher_roles(spec, card, teacher)
    if spec.evaluation.completions or spec.evaluation.canary:
        found.append(evaluating_engine(spec, card))
    return found


def training_role(spec: Spec, stage: StageFields, card: int, teacher: TeacherSize | None) -> RoleMemory:
    """A stage's trainer. In a TeacherForced stage it also holds the teacher's output matrix, and trains a
    projection to the teacher's width."""
    width = teacher.hidden if teacher is not None and stage.runs_teacher else None
    chosen = trainer_microbatch(spec, stage, card, width)
    memory = memory_of_stage(chosen, spec, stage, width)
    microbatch = MicrobatchPlan(
        positions=chosen.rows * spec.training.sequence_length,
        sequences=chosen.rows,
        recomputed_layers=chosen.recomputed_layers,
        layers=STUDENTS[spec.student.shape].layers,
        sharded_gradients=chosen.sharded_gradients,
    )
    items = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "logits": memory.head,
        "context": memory.context,
    }
    return RoleMemory(
        stage.name, "train", ranks(spec.student, stage), items, card, memory.total, microbatch=microbatch
    )


def trainer_microbatch(spec: Spec, stage: StageFields, card: int, teacher_width: int | None) -> Microbatch:
    """The microbatch of a stage's trainer; if none fits, the one that needs the least memory."""
    return choose_for_stage(spec, stage, card, teacher_width) or least_for_stage(spec, stage)


def sampling_engines(spec: Spec, stage: StageFields, card: int) -> RoleMemory:
    """A stage's sampler."""
    length = spec.training.sequence_length
    return _engines(spec, f"{stage.name}-sampler", "sampler", stage.sampler_gpus, card, length, ENGINES)


def evaluating_engine(spec: Spec, card: int) -> RoleMemory:
    """The student that is evaluated, whose engine generates a token after each sequence that it scores."""
    return _engines(spec, "evaluate", "evaluate", 1, card, spec.training.sequence_length + 1, 1)


def _engines(spec: Spec, step: str, role: str, gpus: int, card: int, length: int, most: int) -> RoleMemory:
    """The student in vLLM for sequences of up to `length` tokens, with at most `most` engines on each GPU.
    Their caches take what is left, of at least one sequence."""
    size = STUDENTS[spec.student.shape]
    one = divide_card(size, card, length, most)
    items = {
        "weights": one.engines * one.weights,
        "activations": one.engines * one.activations,
        "logits": one.engines * one.logits,
        "cache": max(one.engines * one.cache, sequence_bytes(size, length)),
        "context": one.engines * one.context,
    }
    needed = needed_to_sample(size, length)
    return RoleMemory(step, role, gpus, items, card, needed, one.engines, one.sequences)


def teacher_roles(spec: Spec, card: int, teacher: TeacherSize) -> Iterator[RoleMemory]:
    """The teacher of each step that has one."""
    length = spec.training.sequence_length
    if any(stage.needs_rescoring for stage in spec.stages):
        yield scoring_teacher("rescore", teacher, spec.rescoring_gpus, card, length)
    for stage in spec.stages:
        if stage.samples:
            yield scoring_teacher(f"{stage.name}-teacher", teacher, spec.teacher.gpus, card, length)
    for stage in spec.stages:
        if stage.runs_teacher:
            microbatch = trainer_microbatch(spec, stage, card, teacher.hidden)
            gpus = teacher_processes(spec.teacher, spec.student, stage)
            positions = -(-ranks(spec.student, stage) // gpus) * microbatch.rows * length
            yield forced_teacher(stage.name, teacher, gpus, card, spec.dataset.max_length, positions)


def scoring_teacher(step: str, teacher: TeacherSize, gpus: int, card: int, length: int) -> RoleMemory:
    """The teacher in vLLM, which scores sequences of up to `length` tokens."""
    tokens = max(LEAST_TOKENS, forward_tokens(teacher, card, length))
    activations = tokens * teacher.activations
    least = teacher.cached * (tokens + length)
    items = {
        "weights": teacher.stored,
        "activations": activations,
        "cache": max(least, teacher_share(card) - teacher.stored - activations - ENGINE),
        "context": ENGINE,
    }
    return RoleMemory(step, "teacher", gpus, items, card, needed_to_score(teacher, length))


def forced_teacher(
    step: str, teacher: TeacherSize, gpus: int, card: int, longest: int, positions: int
) -> RoleMemory:
    """A teacher beside a TeacherForced stage: each of its GPUs holds the whole model in vLLM, as it is stored
    and without the output matrix, which it sends to the students. `longest`: tokens of a document;
    `positions`: those that it answers at a time."""
    share, whole = TEACHER_SHARE
    items = {
        "weights": teacher.stored - teacher.output,
        "activations": FORWARD_TOKENS * teacher.activations,
        "context": ENGINE,
    }
    held, least = sum(items.values()), teacher.cached * (FORWARD_TOKENS + longest)
    answers = ANSWERS * positions * teacher.hidden * teacher.itemsize
    needed = max(
        -(-(held + least) * whole // share),
        -(-(teacher.output + answers) * whole // (whole - share)),
    )
    items["cache"] = max(least, teacher_share(card) - held)
    items["logits"] = teacher.output + answers
    return RoleMemory(step, "teacher", gpus, items, card, needed)


def teacher_problem(memory: RoleMemory, teacher: TeacherSize, card: str) -> str:
    """Why the teacher of a step does not fit, with the numbers and the remedy. `card`: the GPUs' memory."""
    need, weights = -(-memory.needed // GIB), f"{memory.items['weights'] / GIB:.1f} GiB of weights"
    beside = fewer = ""
    if "logits" in memory.items:
        beside = "beside its students "
        weights += f", {memory.items['logits'] / GIB:.1f} GiB of output matrix and answers"
        fewer = "raise spec.teacher.gpus, so that each has fewer students, or "
    return (
        f"spec.teacher.model: {teacher.name} needs GPUs of {need} GiB, and a GPU has {card} "
        f"(spec.runtime.gpuMemory): step {memory.step} holds the whole teacher in vLLM {beside}on each of "
        f"its GPUs ({weights}). Either use a smaller teacher, or its release in MXFP4, or {fewer}use GPUs "
        "with more memory."
    )


def teacher_problems(spec: Spec, teacher: TeacherSize, card: int, written: str) -> list[str]:
    """What does not fit of the teacher's roles on cards of `card` bytes, `written` for people."""
    return [
        teacher_problem(role, teacher, written)
        for role in teacher_roles(spec, card, teacher)
        if not role.fits
    ]
