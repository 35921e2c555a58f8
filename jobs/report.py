"""Write the report of a run: one page that says what happened in it so far.

All the work is in vpmoe.report; this file binds it to a pod, or to a shell.
"""

from jobs.entrypoint import entrypoint, record_success
from vpmoe.report.step import write_report


def main() -> None:
    """Write the report, in the place of an earlier one."""
    run, context = entrypoint("report")
    write_report(run, context.bucket, context.provenance, context.stopping, context.board)
    record_success(context.board)


if __name__ == "__main__":
    main()
