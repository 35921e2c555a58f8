"""Scoring windows that only counts: each worker its own, as soon as they have rollouts; progress, SIGTERM."""

from jobs.entrypoint import entrypoint
from jobs.windows import fill


def main() -> None:
    run, context = entrypoint("teacher")
    fill(run, context, "scores", context.worker or 0, run.spec.teacher.gpus)


if __name__ == "__main__":
    main()
