"""Turn a run's text into a dataset.

All the work is in vpmoe.data; this file binds it to a pod of an Indexed Job, or to a shell.
"""

from jobs.entrypoint import entrypoint


def main() -> None:
    """Make this pod's parts of the dataset."""
    # Imported here because every encoding process imports this module again and needs none of it.
    from vpmoe.data.preprocess.encode import EncoderPool
    from vpmoe.data.preprocess.step import preprocess

    run, context = entrypoint("preprocess")
    with EncoderPool() as encoders:
        preprocess(run, context.bucket, context.provenance, context.stopping, context.worker, encoders)


if __name__ == "__main__":
    main()
