"""Turn a run's text into a data set. All the work is vpmoe.data's; this file binds it to a pod of an Indexed Job, or to a shell."""

from jobs.entrypoint import entrypoint


def main() -> None:
    """Preprocess what this pod is assigned."""
    from vpmoe.data.preprocess.encode import (
        Encoders,  # here, because each encoding process imports this module again and needs none of it
    )
    from vpmoe.data.preprocess.preprocess import preprocess

    run, context = entrypoint("preprocess")
    with Encoders() as encoders:
        preprocess(run, context.bucket, context.provenance, context.stopping, context.worker, encoders)


if __name__ == "__main__":
    main()
