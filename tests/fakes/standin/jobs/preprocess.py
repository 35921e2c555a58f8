"""Stand-in preprocessing: reports a dataset that does not exist, within a second."""

import hashlib

from jobs.entrypoint import entrypoint, record_success
from jobs.script import Script, report_progress
from vpmoe.api.progress import Amount, DatasetStatus, Progress
from vpmoe.clock import now
from vpmoe.storage import paths


def main() -> None:
    run, context = entrypoint("preprocess")
    script = Script.from_run(run, context)
    dataset = hashlib.sha256(run.config_hash.encode()).hexdigest()
    facts = DatasetStatus(
        id=dataset, manifest=context.bucket.url(paths.manifest(paths.dataset(dataset))), sha256=dataset
    )
    total = run.spec.dataset.workers
    for part in range(total + 1):
        state = "Succeeded" if part == total else "Running"
        progress = Progress(
            run=run.identity,
            step=context.step,
            attempt=context.attempt,
            state=state,
            message=f"{part} of {total} parts",
            updated=now(),
            parts=Amount(done=part, total=total),
            dataset=facts,
        )
        if not context.worker:  # one worker reports for all
            report_progress(run, context, progress)
        if part < total:
            script.reach(-1 - part)
    record_success(context.board)


if __name__ == "__main__":
    main()
