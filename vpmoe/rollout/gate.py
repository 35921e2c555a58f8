"""Whether an OnPolicy stage may begin: its `require` against the evaluation of the stage before. No torch.

Sampler, teacher and trainer each ask at their start and get the same answer, because an evaluation is written
once.
"""

from vpmoe.api import DistillRun
from vpmoe.api.stages import Stage
from vpmoe.failure import Permanent
from vpmoe.rollout import evaluation_record
from vpmoe.storage import Bucket, paths


def require_validity(run: DistillRun, stage: Stage, bucket: Bucket) -> None:
    """Raise Permanent unless the student before the stage gives as many valid completions as the stage
    requires.

    A stage that requires none always passes: other kinds than OnPolicy, and require.validity 0. If the
    validity after the stage before was not measured, that is an error too. Raises StorageError.
    """
    if stage.required_validity == 0:
        return
    required = f"stage {stage.name}: require.validity is {stage.required_validity:g}"
    # The API guarantees that there is a stage before, and that its evaluation samples completions.
    before = run.spec.stages[run.spec.stages.index(stage) - 1].name
    found = evaluation_record.load_evaluation(run, before, bucket)
    if found is None or found.valid_share is None:
        raise Permanent(
            f"{required}, and {bucket.url(paths.evaluation(run, before))} has no validity after "
            f"stage {before}. Measure it first: python -m jobs.evaluate --step {before}-evaluate."
        )
    if found.valid_share < stage.required_validity:
        by_effort = ", ".join(
            f"{effort} {share:.3f}" for effort, share in found.valid_share_by_effort().items()
        )
        counts = ", ".join(
            f"{count} {outcome}"
            for outcome, count in sorted(found.validity.items(), key=lambda outcome: -outcome[1])
            if count
        )
        raise Permanent(
            f"{required}, and after stage {before} it is {found.valid_share:.3f} ({by_effort}; of "
            f"{found.completions} completions {counts}). In a new run, which may resumeFrom this one, train "
            f"longer before {stage.name}, or lower require.validity; 0 asks for none."
        )
