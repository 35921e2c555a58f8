"""Stand-in sampler: writes as many windows as its script says, one after another. Reports progress, obeys
SIGTERM."""

from jobs.entrypoint import entrypoint, record_success
from jobs.windows import write_windows


def main() -> None:
    run, context = entrypoint("sampler")
    write_windows(run, context, "rollouts", 0, 1)
    record_success(context.board)


if __name__ == "__main__":
    main()
