"""Sample the windows of an OnPolicy stage.

All the work is in vpmoe.sampler; this file binds it to a pod, or to a shell.
"""

import tempfile
from pathlib import Path

from jobs.entrypoint import entrypoint
from vpmoe.api.stages import OnPolicy
from vpmoe.inference.engine_pool import EnginePool
from vpmoe.sampler.sampler import sample_stage


def main() -> None:
    """Sample the windows that earlier attempts have not sampled."""
    run, context = entrypoint("sampler")
    stage = run.stage_of(context.step)
    assert isinstance(stage, OnPolicy), "no other stage has a step of this role"
    scratch = Path(tempfile.gettempdir()) / "vpmoe-sampler"
    with EnginePool(stage.sampler.gpus, run.spec.student.shape, run.spec.training.sequence_length) as engines:
        sample_stage(run, stage, context.bucket, context.provenance, context.stopping, engines, scratch)


if __name__ == "__main__":
    main()
