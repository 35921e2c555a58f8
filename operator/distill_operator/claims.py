"""What runs ask of the pool of GPUs, and when. Pure; whether they get it is gpus.py's arithmetic."""

from distill_operator.gpu_scheduler import GpuRequest
from distill_operator.observe import ObservedRun
from distill_operator.plan import holds_gpus
from distill_operator.run_status import failing
from vpmoe.api import DistillRun
from vpmoe.api.layout import largest_pod


def needs_gpus(live: ObservedRun) -> bool:
    """Whether the run waits for GPUs, or would if it were looked at now."""
    run, status = live.run, live.status
    if run is None or live.deleting or holds_gpus(status) or run.spec.suspend or run.spec.runtime.queue_name:
        return False
    return status.phase != "Succeeded" and failing(status, run) is None


def claim_of(run: DistillRun, live: ObservedRun) -> GpuRequest:
    """What a run asks of the pool for its whole life: DistillRun.needs lets no more be alive at once."""
    spec = run.spec
    return GpuRequest(
        name=f"{live.namespace}/{live.name}",
        uid=live.uid,
        created=live.created,
        teacher=spec.teacher.gpus,
        student=spec.student.gpus,
        per_pod=max(largest_pod(spec.student, stage) for stage in spec.stages),
        selector=spec.runtime.node_selector,
        admitted=holds_gpus(live.status),
    )
