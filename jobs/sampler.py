"""Sample the windows of an OnPolicy stage.

All the work is in vpmoe.sampler; this file binds it to a pod, or to a shell.
"""

import os

from jobs.entrypoint import entrypoint, record_success
from vpmoe.api.stages import OnPolicy
from vpmoe.inference.engine_pool import EnginePool
from vpmoe.inference.request_queue import engines_per_gpu, queue_depth
from vpmoe.process.gpu import job_meter
from vpmoe.rollout.version_volume import VersionVolume, mounted_volume
from vpmoe.sampler.sampler import sample_stage
from vpmoe.storage.scratch import shared_folder


def main() -> None:
    """Sample the windows that earlier attempts have not sampled."""
    run, context = entrypoint("sampler")
    stage = run.stage_of(context.step)
    assert isinstance(stage, OnPolicy), "no other stage has a step of this role"
    scratch = shared_folder("vpmoe-sampler")
    mounted = mounted_volume()
    volume = VersionVolume(mounted, run, stage.name) if mounted else None
    shape, length = run.spec.student.shape, run.spec.training.sequence_length
    gpus, depth, most = stage.sampler.gpus, queue_depth(os.environ), engines_per_gpu(os.environ)
    with EnginePool(gpus, shape, length, depth, most) as engines, job_meter() as meter:
        sample_stage(
            run,
            stage,
            context.bucket,
            context.provenance,
            context.stopping,
            context.board,
            engines,
            scratch,
            meter.read,
            volume,
        )
    record_success(context.board)


if __name__ == "__main__":
    main()
