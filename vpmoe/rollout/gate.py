"""Whether an OnPolicy stage may begin: what its `require` asks of the student that the stage before left. No torch.

The stage's sampler, teacher and trainer each ask at their start and hear the same, for the evaluation does not change once it is written.
"""

from vpmoe.api import DistillRun
from vpmoe.api.stages import OnPolicy, Stage
from vpmoe.failure import Permanent
from vpmoe.rollout import evaluation_record
from vpmoe.storage import Bucket, paths


def check(run: DistillRun, stage: Stage, bucket: Bucket) -> None:
    """Raise Permanent, with the number and the remedy, unless the student before an OnPolicy stage answers validly often enough.

    Stages of other kinds, and require.validity 0, ask for nothing. A stage before whose validity was not measured is as one that fell
    short. Raises StorageError.
    """
    if not isinstance(stage, OnPolicy) or stage.require.validity == 0:
        return
    asks = f"stage {stage.name}: require.validity is {stage.require.validity:g}"
    before = run.spec.stages[
        run.spec.stages.index(stage) - 1
    ].name  # a rule of Spec: there is one, and completions are sampled after it
    found = evaluation_record.load(run, before, bucket)
    if found is None or found.valid is None:
        raise Permanent(
            f"{asks}, and {bucket.url(paths.evaluation(run, before))} does not say what it is after stage {before}. Measure it first: "
            f"python -m jobs.evaluate --step {before}-evaluate."
        )
    if found.valid < stage.require.validity:
        by_effort = ", ".join(f"{effort} {share:.3f}" for effort, share in found.shares().items())
        kinds = ", ".join(
            f"{count} {kind}"
            for kind, count in sorted(found.validity.items(), key=lambda kind: -kind[1])
            if count
        )
        raise Permanent(
            f"{asks}, and after stage {before} it is {found.valid:.3f} ({by_effort}; of {found.completions} completions {kinds}). In a new "
            f"run, which may resumeFrom this one, train longer before {stage.name}, or lower require.validity; 0 asks for none."
        )
