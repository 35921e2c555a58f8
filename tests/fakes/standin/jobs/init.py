"""Stand-in init: writes weights that are one object. It obeys its script at step -501."""

from jobs.entrypoint import entrypoint, record_success
from jobs.script import Script, report_progress
from vpmoe.api.progress import Amount, Progress
from vpmoe.clock import now
from vpmoe.storage import paths


def main() -> None:
    run, context = entrypoint("init")
    Script.from_run(run, context).reach(-501)
    key = paths.manifest(paths.init(run))
    context.bucket.write_json(key, {"shape": run.spec.student.shape}, context.provenance.metadata())
    progress = Progress(
        run=run.identity,
        step=context.step,
        attempt=context.attempt,
        state="Succeeded",
        message="Made 1 file",
        updated=now(),
        parts=Amount(done=1, total=1),
    )
    report_progress(run, context, progress)
    record_success(context.board)


if __name__ == "__main__":
    main()
