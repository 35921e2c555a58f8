"""What saving a stage's state takes of each of its pods: host memory, and time after SIGTERM.

Integer arithmetic that the operator, which makes the pods, and `vpmoe plan` share.
"""

from vpmoe.api.layout import layout
from vpmoe.api.memory import STUDENTS
from vpmoe.api.stages import StageFields
from vpmoe.api.student import StudentSpec
from vpmoe.api.training import TrainingSpec

BUCKET_SPEED = 250_000_000
"""Bytes a second that each pod must be able to write to the bucket. A pod that is slower may be killed before
its last checkpoint exists; the stage then continues from the one before."""
LAST_STEP_SECONDS = 60
"""Time for the step at hand when SIGTERM comes, and for what is not proportional to bytes."""
LEAST_GRACE_SECONDS = 300
"""Grace period of pods with less, or nothing, to save."""


def pod_checkpoint(student: StudentSpec, training: TrainingSpec, stage: StageFields) -> int:
    """Bytes of a checkpoint that each pod of the stage writes: the ranks have equal shares."""
    return -(-STUDENTS[student.shape].checkpoint // layout(student, training, stage).pods)


def grace_seconds(student: StudentSpec, training: TrainingSpec, stage: StageFields) -> int:
    """Time that a training pod has after SIGTERM: for the checkpoint that is being written, then for the
    last one."""
    upload = -(-pod_checkpoint(student, training, stage) // BUCKET_SPEED)
    return max(LEAST_GRACE_SECONDS, LAST_STEP_SECONDS + 2 * upload)


def host_copies(student: StudentSpec, training: TrainingSpec, stage: StageFields) -> int:
    """Bytes of host memory of each training pod that hold copies of the student while they are uploaded: of a
    checkpoint, and in an OnPolicy stage of a policy version."""
    version = STUDENTS[student.shape].weights if stage.samples else 0
    return pod_checkpoint(student, training, stage) + version
