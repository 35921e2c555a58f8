"""Measure the student at the end of a stage, or the validity of its checkpoints while it trains.

All the work is in vpmoe.evaluation; this file binds it to a pod, or to a shell.
"""

from jobs.entrypoint import entrypoint, record_success
from vpmoe.evaluation.evaluate import evaluate
from vpmoe.evaluation.validity import measure_while_training
from vpmoe.inference.engine_pool import EnginePool
from vpmoe.process.gpu import job_meter


def main() -> None:
    """Measure what earlier attempts of the step have not measured."""
    run, context = entrypoint("evaluate")
    stage = run.stage_of(context.step)
    assert stage is not None, "entrypoint rejects steps of other roles"
    shape, length = run.spec.student.shape, run.spec.training.sequence_length + 1
    with EnginePool(1, shape, length) as engines, job_meter() as meter:
        measure = measure_while_training if run.serves_trainer(context.step) else evaluate
        measure(
            run,
            stage,
            context.bucket,
            context.provenance,
            context.stopping,
            context.board,
            engines,
            meter.read,
        )
    record_success(context.board)


if __name__ == "__main__":
    main()
