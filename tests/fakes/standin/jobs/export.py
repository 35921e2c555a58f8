"""Stand-in export: writes a model that is one object, and reports it. It obeys its script at step -401."""

from jobs.entrypoint import entrypoint, record_success
from jobs.script import Script, report_progress
from vpmoe.api.progress import Amount, Progress
from vpmoe.clock import now
from vpmoe.storage import paths


def main() -> None:
    run, context = entrypoint("export")
    stage = run.stage_of(context.step)
    assert stage is not None
    folder = paths.model(run, stage.name)
    Script.from_run(run, context).reach(-401)
    context.bucket.write_json(paths.manifest(folder), {"stage": stage.name}, context.provenance.metadata())
    progress = Progress(
        run=run.identity,
        step=context.step,
        attempt=context.attempt,
        state="Succeeded",
        message="Exported 1 file",
        updated=now(),
        parts=Amount(done=1, total=1),
        model=context.bucket.url(folder),
    )
    report_progress(run, context, progress)
    record_success(context.board)


if __name__ == "__main__":
    main()
