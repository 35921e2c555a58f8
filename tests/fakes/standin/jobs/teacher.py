"""Stand-in teacher: each worker writes the scores of its windows as soon as they have rollouts. Reports
progress, obeys SIGTERM."""

from jobs.entrypoint import entrypoint, record_success
from jobs.windows import write_windows


def main() -> None:
    run, context = entrypoint("teacher")
    write_windows(run, context, "scores", context.worker or 0, run.spec.teacher.gpus)
    record_success(context.board)


if __name__ == "__main__":
    main()
