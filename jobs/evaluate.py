"""Measure the student at the end of a stage.

All the work is in vpmoe.evaluation; this file binds it to a pod, or to a shell.
"""

from jobs.entrypoint import entrypoint
from vpmoe.evaluation.evaluate import evaluate
from vpmoe.inference.engine_pool import EnginePool


def main() -> None:
    """Measure what earlier attempts have not measured."""
    run, context = entrypoint("evaluate")
    stage = run.stage_of(context.step)
    assert stage is not None, "entrypoint rejects steps of other roles"
    with EnginePool(1, run.spec.student.shape, run.spec.training.sequence_length + 1) as engines:
        evaluate(run, stage, context.bucket, context.provenance, context.stopping, engines)


if __name__ == "__main__":
    main()
