"""Turn a run's text into a dataset. The first worker also refuses a teacher that the run cannot use.

All the work is in vpmoe.data and vpmoe.teacher; this file binds it to a pod of an Indexed Job, or to a shell.
"""

import os

from jobs.entrypoint import entrypoint, record_success

GPU_MEMORY = "VPMOE_GPU_MEMORY"
"""Variable with runtime.gpuMemory, which is not in the run file of a pod."""


def main() -> None:
    """Make this pod's parts of the dataset."""
    # Imported here because every encoding process imports this module again and needs none of it.
    from vpmoe.data.preprocess.encode import EncoderPool
    from vpmoe.data.preprocess.step import preprocess
    from vpmoe.teacher.early_check import check_teacher

    run, context = entrypoint("preprocess")
    if not context.worker:
        check_teacher(run, context.bucket, os.environ.get(GPU_MEMORY) or run.spec.runtime.gpu_memory)
    with EncoderPool() as encoders:
        preprocess(
            run,
            context.bucket,
            context.provenance,
            context.stopping,
            context.board,
            context.worker,
            encoders,
        )
    record_success(context.board)


if __name__ == "__main__":
    main()
