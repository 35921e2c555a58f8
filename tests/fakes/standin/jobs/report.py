"""Stand-in report: writes an empty page, and reports it. It obeys its script at step -601."""

from jobs.entrypoint import entrypoint, record_success
from jobs.script import Script, report_progress
from vpmoe.api.progress import Progress
from vpmoe.clock import now
from vpmoe.storage import paths


def main() -> None:
    run, context = entrypoint("report")
    Script.from_run(run, context).reach(-601)
    context.bucket.put_bytes(paths.report(run), b"", context.provenance.metadata())
    progress = Progress(
        run=run.identity,
        step=context.step,
        attempt=context.attempt,
        state="Succeeded",
        message="Wrote the report",
        updated=now(),
    )
    report_progress(run, context, progress)
    record_success(context.board)


if __name__ == "__main__":
    main()
