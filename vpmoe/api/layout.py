"""How a stage is spread over GPUs and sequences: ranks, pods, and what one optimizer step is made of.

Pure arithmetic over the specification. The sums that must come out are rules of Spec (spec.py), so a Spec that exists has a layout.
"""

from dataclasses import dataclass

from vpmoe.api.stages import StageFields
from vpmoe.api.student import StudentSpec
from vpmoe.api.training import TrainingSpec

EXPERTS = {"vpmoe-6b": 256, "tiny": 8}
"""Experts of each student shape. vpmoe.model.shapes holds the shapes themselves, and a test of it compares the two."""


@dataclass(frozen=True)
class Layout:
    """One stage's layout."""

    ranks: int
    """Training processes, one GPU each."""
    pods: int
    """Training pods: the Master and pods − 1 Workers of a PyTorchJob, or the one pod of a Job."""
    processes_per_pod: int
    """Training processes of each pod, one GPU each."""
    first_pod_gpus: int
    """GPUs of the first pod, which is the Master or the one pod of a Job. In a TeacherForced stage one more than processes: the teacher's
    own process stands there, on the GPU after theirs, however many GPUs teacher.gpus has for rescoring."""
    data_parallel: int
    """Ranks that each take their own part of a batch: all of them."""
    expert_parallel: int
    """Ranks that share one set of experts."""
    sequences_per_rank: int
    """Packed sequences that one rank takes in one optimizer step."""
    sequences_per_step: int
    """Packed sequences of one optimizer step, on all ranks."""
    tokens_per_step: int
    """Positions of one optimizer step, padding included: sequences × training.sequenceLength, at most training.globalBatchTokens."""


def ranks(student: StudentSpec, stage: StageFields) -> int:
    """Training processes of a stage: the student's GPUs, less those that an OnPolicy stage samples on."""
    return student.gpus - stage.sampler_gpus


def pod_size(student: StudentSpec, stage: StageFields) -> int:
    """Training processes of one pod, at most gpusPerPod."""
    return min(ranks(student, stage), student.gpus_per_pod or student.gpus)


def layout(student: StudentSpec, training: TrainingSpec, stage: StageFields) -> Layout:
    """The layout of one stage of a specification."""
    world, size = ranks(student, stage), pod_size(student, stage)
    per_rank = training.global_batch_tokens // (training.sequence_length * world)
    return Layout(
        ranks=world,
        pods=world // size,
        processes_per_pod=size,
        first_pod_gpus=size + stage.teacher_processes,
        data_parallel=world,
        expert_parallel=student.expert_parallel,
        sequences_per_rank=per_rank,
        sequences_per_step=per_rank * world,
        tokens_per_step=per_rank * world * training.sequence_length,
    )


def largest_pod(student: StudentSpec, stage: StageFields) -> int:
    """GPUs of the stage's largest pod: of its first that trains, or of the one that samples for an OnPolicy stage."""
    return max(
        pod_size(student, stage) + stage.teacher_processes,
        stage.sampler_gpus,
    )
