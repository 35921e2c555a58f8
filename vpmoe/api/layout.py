"""A stage's layout: ranks, pods, and the sequences of one optimizer step.

Pure arithmetic over the specification. Divisibility is checked by rules.py, so every valid Spec has a layout.
"""

from dataclasses import dataclass

from vpmoe.api.stages import StageFields
from vpmoe.api.student import StudentSpec, TeacherSpec
from vpmoe.api.training import TrainingSpec

EXPERTS = {"vpmoe-6b": 256, "tiny": 8}
"""Number of experts of each student shape, equal to those in vpmoe.model.shapes: a test compares the two."""


@dataclass(frozen=True)
class Layout:
    """The layout of one stage."""

    ranks: int
    """Number of training processes, one GPU each."""
    pods: int
    """Number of training pods: the Master and pods − 1 Workers of a PyTorchJob, or the one pod of a Job."""
    processes_per_pod: int
    """Training processes in each pod, one GPU each."""
    data_parallel: int
    """Data-parallel size: all ranks."""
    expert_parallel: int
    """Number of ranks that share one set of experts."""
    sequences_per_rank: int
    """Packed sequences of one rank in one optimizer step."""
    sequences_per_step: int
    """Packed sequences of all ranks in one optimizer step."""
    tokens_per_step: int
    """Positions of one optimizer step, including padding: sequences_per_step × training.sequenceLength, at
    most training.globalBatchTokens."""


def ranks(student: StudentSpec, stage: StageFields) -> int:
    """Number of training processes of a stage: student.gpus, less those that sample."""
    return student.gpus - stage.sampler_gpus


def pod_size(student: StudentSpec, stage: StageFields) -> int:
    """Training processes in one pod, at most student.gpusPerPod."""
    return min(ranks(student, stage), student.gpus_per_pod or student.gpus)


def layout(student: StudentSpec, training: TrainingSpec, stage: StageFields) -> Layout:
    """The layout of a stage."""
    world, size = ranks(student, stage), pod_size(student, stage)
    per_rank = training.global_batch_tokens // (training.sequence_length * world)
    return Layout(
        ranks=world,
        pods=world // size,
        processes_per_pod=size,
        data_parallel=world,
        expert_parallel=student.expert_parallel,
        sequences_per_rank=per_rank,
        sequences_per_step=per_rank * world,
        tokens_per_step=per_rank * world * training.sequence_length,
    )


def teacher_processes(teacher: TeacherSpec, student: StudentSpec, stage: StageFields) -> int:
    """Teachers that run beside the ranks of a TeacherForced stage, one GPU each: teacher.gpus, but at most
    one a rank. 0 in other stages."""
    return min(teacher.gpus, ranks(student, stage)) if stage.runs_teacher else 0


def first_pod_gpus(teacher: TeacherSpec, student: StudentSpec, stage: StageFields) -> int:
    """GPUs of the first training pod, which is the Master or the one pod of a Job: those of its ranks, then
    those of the teachers."""
    return pod_size(student, stage) + teacher_processes(teacher, student, stage)


def largest_pod(teacher: TeacherSpec, student: StudentSpec, stage: StageFields) -> int:
    """GPUs of the stage's largest pod: the first training pod or the sampler's pod."""
    return max(first_pod_gpus(teacher, student, stage), stage.sampler_gpus)
