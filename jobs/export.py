"""Export the student at the end of a stage as a model for transformers and vLLM.

All the work is in vpmoe.export; this file binds it to a pod, or to a shell.
"""

from jobs.entrypoint import entrypoint, record_success
from vpmoe.export.step import export_stage


def main() -> None:
    """Export what earlier attempts have not exported."""
    run, context = entrypoint("export")
    stage = run.stage_of(context.step)
    assert stage is not None, "entrypoint rejects steps of other roles"
    export_stage(run, stage, context.bucket, context.provenance, context.stopping, context.board)
    record_success(context.board)


if __name__ == "__main__":
    main()
