"""Sampling that only counts: windows one after another, until there are as many as its script says; progress, SIGTERM."""

from jobs.entrypoint import entrypoint
from jobs.windows import fill


def main() -> None:
    run, context = entrypoint("sampler")
    fill(run, context, "rollouts", 0, 1)


if __name__ == "__main__":
    main()
