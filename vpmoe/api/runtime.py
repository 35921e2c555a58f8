"""spec.runtime: how the run's pods are made, and when the operator gives up."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from vpmoe.api.base import ApiModel, Rule, TextPattern
from vpmoe.api.quantities import Duration, QuantityText
from vpmoe.api.storage import SECRET

Role = Literal["preprocess", "rescore", "train", "teacher", "sampler", "evaluate", "report"]

NAME = TextPattern(
    r"|[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "must be the name of an object in the cluster, or empty", 253
)
LabelKey = Annotated[str, Field(max_length=317)]
LabelValue = Annotated[str, Field(max_length=63)]
Quantity = Annotated[str, QuantityText()]
Quantities = Annotated[dict[Annotated[str, Field(max_length=128)], Quantity], Field(max_length=16)]

GPU = "nvidia.com/gpu"


class Resources(ApiModel):
    """Requests and limits of one role's container, as Kubernetes knows them."""

    requests: Quantities = Field(default={})
    """What the scheduler sets aside for the container, such as cpu, memory and ephemeral-storage."""
    limits: Quantities = Field(default={})
    """What the container may use at most. Above its memory limit it is killed."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            f"{GPU} is not set here: student.gpus, student.gpusPerPod, sampler.gpus and teacher.gpus say how many GPUs a pod has.",
            cel=f"!('{GPU}' in self.requests) && !('{GPU}' in self.limits)",
            broken=lambda r, _: {} if GPU in r.requests or GPU in r.limits else None,
        ),
    )


class Toleration(ApiModel):
    """A taint that the run's pods tolerate, as in a pod's spec."""

    key: LabelKey | None = None
    """Key of the taint; absent with operator Exists tolerates every taint."""
    operator: Literal["Exists", "Equal"] | None = None
    """Whether the taint's value must be Equal, which is Kubernetes' default, or whether it Exists is enough."""
    value: LabelValue | None = None
    """Value of the taint, where operator is Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; absent means all."""
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seconds that a pod stays on a node after a NoExecute taint; absent means for ever."""


class PullSecret(ApiModel):
    """A Secret with the credentials of a container registry."""

    name: Annotated[str, SECRET]
    """Name of the Secret in the run's namespace."""


class RuntimeSpec(ApiModel):
    """How the run's pods are made, and when the operator gives up. Once the run has started, only `attempts` may be changed."""

    backend: Literal["PyTorchJob", "Job"] = "PyTorchJob"
    """What a training stage is made as: PyTorchJob of the Kubeflow training operator, on one node or several; or Job, a plain batch/v1
    Job on one node, which needs nothing installed."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Failures in a row without a new checkpoint, part or window after which a step fails for good. Evictions, drains and suspensions do
    not count. It may be raised on a failed run, which then goes on."""
    stalled_after: Duration = 900
    """Time without progress after which the run's Stalled condition turns True, as "15m". It stops nothing."""
    resources: dict[Role, Resources] = Field(default={})
    """Requests and limits by role: preprocess, rescore, train, teacher, sampler, evaluate, report. A role that is absent gets the
    chart's."""
    service_account_name: Annotated[str, NAME] = ""
    """Service account of the run's pods; empty means the namespace's default. Pods need no right in the cluster."""
    image_pull_secrets: Annotated[tuple[PullSecret, ...], Strict(False), Field(max_length=16)] = ()
    """Secrets to pull the images with."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] = Field(default={})
    """Labels of the nodes that the run's pods may stand on. They are also the pool whose GPUs are counted before a run starts."""
    tolerations: Annotated[tuple[Toleration, ...], Strict(False), Field(max_length=16)] = ()
    """Taints that the run's pods tolerate."""
    priority_class_name: Annotated[str, NAME] = ""
    """Priority class of the run's pods; empty means the cluster's default."""
    queue_name: Annotated[str, NAME] = ""
    """Kueue local queue that decides when the run starts; empty leaves that to the operator's own queue."""
