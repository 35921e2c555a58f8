"""Make a run's initial weights from a dense model.

All the work is in vpmoe.upcycle; this file binds it to a pod, or to a shell.
"""

from jobs.entrypoint import entrypoint, record_success
from vpmoe.upcycle.step import make_initial_weights


def main() -> None:
    """Make the weights unless an earlier attempt has."""
    run, context = entrypoint("init")
    assert run.upcycle is not None, "entrypoint rejects steps that the run does not have"
    make_initial_weights(
        run, run.upcycle, context.bucket, context.provenance, context.stopping, context.board
    )
    record_success(context.board)


if __name__ == "__main__":
    main()
