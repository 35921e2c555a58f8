"""spec.runtime: settings of the run's pods and of retries."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from vpmoe.api.base import ApiModel, Rule, TextPattern
from vpmoe.api.quantities import Duration, QuantityText
from vpmoe.api.storage import SECRET

Role = Literal["preprocess", "rescore", "train", "teacher", "sampler", "evaluate"]

NAME = TextPattern(
    r"|[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "must be the name of an object in the cluster, or empty", 253
)
LabelKey = Annotated[str, Field(max_length=317)]
LabelValue = Annotated[str, Field(max_length=63)]
Quantity = Annotated[str, QuantityText()]
Quantities = Annotated[dict[Annotated[str, Field(max_length=128)], Quantity], Field(max_length=16)]

GPU = "nvidia.com/gpu"


class Resources(ApiModel):
    """Resource requests and limits of one role's container, as in a pod."""

    requests: Quantities = Field(default={})
    """Resources that the scheduler reserves for the container, such as cpu, memory and ephemeral-storage."""
    limits: Quantities = Field(default={})
    """Most resources that the container can use. A container above its memory limit is killed."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            f"{GPU} cannot be set here. Use student.gpus, student.gpusPerPod, sampler.gpus and teacher.gpus.",
            cel=f"!('{GPU}' in self.requests) && !('{GPU}' in self.limits)",
            broken=lambda r, _: {} if GPU in r.requests or GPU in r.limits else None,
        ),
    )


class Toleration(ApiModel):
    """A toleration of the run's pods, as in a pod's spec."""

    key: LabelKey | None = None
    """Key of the taint. Absent with operator Exists tolerates every taint."""
    operator: Literal["Exists", "Equal"] | None = None
    """Equal compares the taint's value with value, which is the default of Kubernetes; Exists ignores the
    value."""
    value: LabelValue | None = None
    """Value of the taint, if operator is Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; absent means all effects."""
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seconds that a pod stays on a node after a NoExecute taint is added; absent means without limit."""


class PullSecret(ApiModel):
    """A Secret with the credentials of a container registry."""

    name: Annotated[str, SECRET]
    """Name of the Secret in the run's namespace."""


class RuntimeSpec(ApiModel):
    """Settings of the run's pods and of retries. Only `attempts` can be changed after the run has started."""

    backend: Literal["PyTorchJob", "Job"] = "PyTorchJob"
    """Kind of a training stage's object: PyTorchJob of the Kubeflow training operator, on one or several
    nodes; or Job, a batch/v1 Job on one node, which needs no other operator."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of consecutive failures without a new checkpoint, part or window after which a step fails
    permanently. Evictions, drains and suspensions do not count. Raise it on a failed run to continue the
    run."""
    stalled_after: Duration = 900
    """Time without progress after which the run's condition Stalled becomes True, such as "15m". It only
    reports: the run is not stopped."""
    resources: dict[Role, Resources] = Field(default={})
    """Resource requests and limits by role: preprocess, rescore, train, teacher, sampler, evaluate. A role
    that is absent uses the defaults of the chart."""
    service_account_name: Annotated[str, NAME] = ""
    """Service account of the run's pods; empty uses the namespace's default. Pods need no permissions in the
    cluster."""
    image_pull_secrets: Annotated[tuple[PullSecret, ...], Strict(False), Field(max_length=16)] = ()
    """Secrets with the credentials to pull the images."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] = Field(default={})
    """Labels of the nodes on which the run's pods can be scheduled. Only GPUs of these nodes are counted
    before a run starts."""
    tolerations: Annotated[tuple[Toleration, ...], Strict(False), Field(max_length=16)] = ()
    """Tolerations of the run's pods."""
    priority_class_name: Annotated[str, NAME] = ""
    """Priority class of the run's pods; empty uses the cluster's default."""
    queue_name: Annotated[str, NAME] = ""
    """Kueue local queue that admits the run; empty uses the operator's own queue."""
