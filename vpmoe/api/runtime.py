"""spec.runtime: settings of the run's pods and of retries. No part of the configuration's hash."""

import re
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from vpmoe.api.base import ApiModel, Rule, TextPattern, cel_string
from vpmoe.api.card import CARD_MEMORY
from vpmoe.api.environment import EnvFromSource, EnvVar, repeated_name
from vpmoe.api.quantities import Duration, QuantityText
from vpmoe.api.storage import SECRET

Role = Literal["init", "preprocess", "rescore", "train", "teacher", "sampler", "evaluate", "export", "report"]

NAME = TextPattern(
    r"|[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "must be the name of an object in the cluster, or empty", 253
)
GPU_MEMORY = TextPattern(
    CARD_MEMORY, 'must be the memory of one GPU in whole G or Gi, such as "80G", "80Gi" or "141G"', 6
)
LabelKey = Annotated[str, Field(max_length=317)]
LabelValue = Annotated[str, Field(max_length=63)]
PodLabelValue = Annotated[
    str,
    TextPattern(
        r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?",
        "must be a label's value: at most 63 letters, digits, '-', '_' and '.', from a letter or digit to a "
        "letter or digit",
        63,
    ),
]
AnnotationValue = Annotated[str, Field(max_length=4096)]
CLAIM = TextPattern(
    r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?",
    "must be the name of a PersistentVolumeClaim in the run's namespace",
    253,
)
Quantity = Annotated[str, QuantityText()]
Quantities = Annotated[dict[Annotated[str, Field(max_length=128)], Quantity], Field(max_length=16)]

GPU = "nvidia.com/gpu"
RESOURCE = (
    r"cpu|memory|ephemeral-storage|hugepages-[1-9][0-9]*(Ki|Mi|Gi)"
    r"|[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
)
"""Names of resources: those of Kubernetes, and extended ones, such as rdma/hca."""
HUGE_PAGES = "hugepages-"
EXTENDED = rf"{HUGE_PAGES}.*|.*/.*"
"""Resources that cannot be overcommitted: the limit is the request."""
WHOLE = r"[0-9]+(k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?"
"""Quantities without a fraction."""


def is_extended(resource: str) -> bool:
    """Whether a resource cannot be overcommitted: huge pages, and devices such as rdma/hca."""
    return re.fullmatch(EXTENDED, resource) is not None


def _resource_names(field: str) -> Rule:
    malformed = f"!k.matches({cel_string(f'^(?:{RESOURCE})$')})"
    return Rule(
        field,
        "{name} is no resource: write cpu, memory, ephemeral-storage, hugepages-2Mi or domain/name, such as "
        "rdma/hca.",
        cel=f"!self.{field}.exists(k, {malformed})",
        broken=lambda r, _: _first(k for k in getattr(r, field) if re.fullmatch(RESOURCE, k) is None),
        terms={"name": f"self.{field}.filter(k, {malformed})[0]"},
        at_apply=True,
    )


def _whole_devices(field: str) -> Rule:
    fraction = f"k.contains('/') && !string(self.{field}[k]).matches({cel_string(f'^{WHOLE}$')})"
    return Rule(
        field,
        "{name} is counted in whole numbers. Write one, such as 1.",
        cel=f"!self.{field}.exists(k, {fraction})",
        broken=lambda r, _: _first(
            k for k, v in getattr(r, field).items() if "/" in k and re.fullmatch(WHOLE, v) is None
        ),
        terms={"name": f"self.{field}.filter(k, {fraction})[0]"},
        at_apply=True,
    )


def _first(names: Iterable[str]) -> dict[str, object] | None:
    """The terms of a message about the first name; None if there is none."""
    name = next(iter(names), None)
    return None if name is None else {"name": name}


_UNEQUAL = (
    f"k.matches({cel_string(f'^(?:{EXTENDED})$')}) && k in self.limits "
    "&& string(self.requests[k]) != string(self.limits[k])"
)
_HAS_HUGE_PAGES = f"exists(k, k.startsWith({cel_string(HUGE_PAGES)}))"


def _huge_pages_alone(resources: "Resources") -> bool:
    names = {*resources.requests, *resources.limits}
    return any(name.startswith(HUGE_PAGES) for name in names) and not names & {"cpu", "memory"}


class Resources(ApiModel):
    """Resource requests and limits of one role's container, as in a pod."""

    requests: Quantities = Field(default={})
    """Resources that the scheduler reserves for the container, such as cpu, memory and ephemeral-storage; and
    devices and huge pages, such as rdma/hca, vpc.amazonaws.com/efa and hugepages-2Mi, of which the limit is
    the request."""
    limits: Quantities = Field(default={})
    """Most resources that the container can use. A container above its memory limit is killed."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *(rule(field) for rule in (_resource_names, _whole_devices) for field in ("requests", "limits")),
        Rule(
            "limits",
            "{name} differs from its request. It cannot be overcommitted: write it once, or both alike.",
            cel=f"!self.requests.exists(k, {_UNEQUAL})",
            broken=lambda r, _: _first(
                k for k, v in r.requests.items() if is_extended(k) and r.limits.get(k, v) != v
            ),
            terms={"name": f"self.requests.filter(k, {_UNEQUAL})[0]"},
            at_apply=True,
        ),
        Rule(
            "",
            "huge pages need cpu or memory beside them. Add one.",
            cel=f"!self.requests.{_HAS_HUGE_PAGES} && !self.limits.{_HAS_HUGE_PAGES} || "
            + " || ".join(f"'{n}' in self.{of}" for n in ("cpu", "memory") for of in ("requests", "limits")),
            broken=lambda r, _: {} if _huge_pages_alone(r) else None,
            at_apply=True,
        ),
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


class TeacherCache(ApiModel):
    """A volume that keeps the teacher's files for later pods and runs."""

    claim_name: Annotated[str, CLAIM]
    """Name of a PersistentVolumeClaim in the run's namespace. It must exist, with room for the teacher, and
    pods that score at the same time must be able to mount it: ReadWriteMany, or one node."""


class WeightsVolume(ApiModel):
    """A volume on which the trainer leaves policy versions for the sampler."""

    claim_name: Annotated[str, CLAIM]
    """Name of a PersistentVolumeClaim in the run's namespace. It must exist, with room for
    ⌈staleness / publishEvery⌉ + 1 versions of an OnPolicy stage, and trainer and sampler must be able to
    mount it: one node, or ReadWriteMany. Its file system must have locks."""


METADATA_KEY = r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
RESERVED_KEY = (
    r"(.*\.)?(kubernetes|k8s)\.io/.*|(.*\.)?vpmoe\.dev/.*|training\.kubeflow\.org/.*"
    r"|kueue\.x-k8s\.io/queue-name|job-name|controller-uid"
)
"""Labels and annotations that the operator, Kubernetes, the training operator and Kueue set."""
AUTOSCALER = "cluster-autoscaler.kubernetes.io/"
"""Prefix of the annotations below kubernetes.io that a pod of ours may have: they are meant for its owner."""


def _metadata_keys(field: str, name: str, but: str = "") -> tuple[Rule, Rule]:
    """Rules for the keys of a mapping of labels or annotations. `but`: a prefix that is not reserved."""
    malformed = f"!k.matches({cel_string(f'^(?:{METADATA_KEY})$')})"
    reserved = f"k.matches({cel_string(f'^(?:{RESERVED_KEY})$')})"
    if but:
        reserved += f" && !k.startsWith({cel_string(but)})"
    return (
        Rule(
            field,
            "{name} is no key. Write name or domain/name of letters, digits, '-', '_' and '.'.",
            cel=f"!has(self.{field}) || !self.{field}.exists(k, {malformed})",
            broken=lambda r, _: _first(k for k in getattr(r, name) if re.fullmatch(METADATA_KEY, k) is None),
            terms={"name": f"self.{field}.filter(k, {malformed})[0]"},
        ),
        Rule(
            field,
            "{name} is reserved: keys of kubernetes.io, k8s.io, vpmoe.dev, training.kubeflow.org and of Jobs "
            "are set by the cluster or the operator, and the queue by runtime.queueName. Remove it.",
            cel=f"!has(self.{field}) || !self.{field}.exists(k, {reserved})",
            broken=lambda r, _: _first(
                k
                for k in getattr(r, name)
                if re.fullmatch(RESERVED_KEY, k) and not (but and k.startswith(but))
            ),
            terms={"name": f"self.{field}.filter(k, {reserved})[0]"},
        ),
    )


class RuntimeSpec(ApiModel):
    """Settings of the run's pods and of retries. `attempts`, `interruptions`, `onStall` and `scheduling` can
    be changed at any time, the others while nothing of the run is alive."""

    backend: Literal["PyTorchJob", "Job"] = "PyTorchJob"
    """Kind of a training stage's object: PyTorchJob of the Kubeflow training operator, on one or several
    nodes; or Job, a batch/v1 Job on one node, which needs no other operator."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of consecutive failures without a new checkpoint, part or window after which a step fails
    permanently. Interruptions and suspensions do not count; an eviction for exceeding the pod's own limit
    does. Raise it on a failed run to continue the run."""
    interruptions: Annotated[int, Field(ge=1, le=1000)] = 20
    """Number of consecutive interruptions without a new checkpoint, part or window after which a step fails
    permanently: drains, preemptions, evictions under node pressure, lost nodes, deleted pods, or a store that
    is away. Raise it on a failed run to continue the run. Can be changed at any time."""
    stalled_after: Duration = 900
    """Time without progress after which the run's condition Stalled becomes True, such as "15m". A new
    attempt does not start it again. onStall says what else happens."""
    on_stall: Literal["Report", "Restart"] = "Report"
    """What happens to a step that makes no progress for stalledAfter while all of its pods run. Report only
    sets the condition Stalled. Restart also deletes its pods and makes a new attempt, which counts as a
    failure; progress that cannot be read is never a reason, and a step must start within stalledAfter. Can be
    changed at any time."""
    report: bool = True
    """Whether a step without GPUs writes the run's report, report/index.html, after each stage. If it fails,
    the run goes on without it."""
    resources: dict[Role, Resources] = Field(default={})
    """Resource requests and limits by role: init, preprocess, rescore, train, teacher, sampler, evaluate,
    export, report. A role that is absent uses the defaults of the chart."""
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
    """Kueue local queue that admits the run's objects, which are created suspended; empty uses the operator's
    own queue."""
    scheduling: Literal["Queued", "Immediate"] | None = None
    """Queued waits until all of the run's GPUs are free, oldest run first. Immediate creates pods at once and
    leaves them to the Kubernetes scheduler, so that an autoscaler sees their demand, also in a pool that has
    no node yet. Absent uses the chart's default. Ignored with queueName. Can be changed at any time."""
    gpu_memory: Annotated[str, GPU_MEMORY] | None = None
    """Memory of one GPU of the run's nodes, such as 80Gi or 141G. Training that cannot fit into it is then
    refused when the run is applied, and a teacher that cannot is refused by the step preprocess, before a GPU
    is asked for; `vpmoe plan` shows the arithmetic. null or absent checks neither."""
    env: Annotated[tuple[EnvVar, ...], Strict(False), Field(max_length=32)] = ()
    """Environment variables of all the run's containers, such as NCCL_DEBUG."""
    env_from: Annotated[tuple[EnvFromSource, ...], Strict(False), Field(max_length=16)] = ()
    """Secrets and ConfigMaps of which every key becomes an environment variable of all the run's containers.
    A later one wins, env wins over all of them, and the operator's own variables over env; a reserved name
    among the keys stops the pod."""
    pod_labels: Annotated[dict[LabelKey, PodLabelValue], Field(max_length=32)] = Field(default={})
    """Labels of the run's pods, beside the operator's. Keys of kubernetes.io, k8s.io, vpmoe.dev and
    training.kubeflow.org are reserved."""
    pod_annotations: Annotated[dict[LabelKey, AnnotationValue], Field(max_length=32)] = Field(default={})
    """Annotations of the run's pods, such as k8s.v1.cni.cncf.io/networks. Reserved are the keys that are for
    podLabels, but not cluster-autoscaler.kubernetes.io/*."""
    scheduler_name: Annotated[str, NAME] = ""
    """Scheduler of the run's pods, such as that of Volcano; empty uses the cluster's default."""
    runtime_class_name: Annotated[str, NAME] = ""
    """Runtime class of the pods with GPUs, such as nvidia where that is not the default of the nodes; empty
    uses the default. Pods without GPUs always do."""
    shared_memory: Quantity | None = None
    """Most bytes of /dev/shm in each pod, such as "16Gi". They count for the container's memory limit. null
    allows half of the node's memory, or the limit."""
    capabilities: Annotated[tuple[Literal["IPC_LOCK"], ...], Strict(False), Field(max_length=1)] = ()
    """Linux capabilities of the pods that train, for RDMA: IPC_LOCK locks memory beyond the limit of the
    container runtime. A capability works for root alone, so these containers run as root without any other
    one, and their namespace must allow the privileged pod security standard."""
    teacher_cache: TeacherCache | None = None
    """Volume that keeps the teacher's files, so that pods and runs after the first do not download them
    again; null downloads them to the disk of each pod that loads the teacher."""
    weights_volume: WeightsVolume | None = None
    """Volume by which the trainer of an OnPolicy stage hands each policy version to the sampler, beside the
    bucket, such as a disk or memory of the node that both run on; null: the sampler waits for the upload to
    the bucket and downloads it."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *_metadata_keys("podLabels", "pod_labels"),
        *_metadata_keys("podAnnotations", "pod_annotations", AUTOSCALER),
        Rule(
            "env",
            "{name} is set twice. Remove one.",
            cel="!has(self.env) || self.env.all(e, self.env.exists_one(f, f.name == e.name))",
            broken=lambda runtime, _: (
                None if (name := repeated_name(runtime.env)) is None else {"name": name}
            ),
            terms={"name": "self.env.filter(e, !self.env.exists_one(f, f.name == e.name))[0].name"},
        ),
        Rule(
            "onStall",
            "Restart needs a stalledAfter above 0s, or it would stop every attempt at once. "
            "Raise stalledAfter, or use Report.",
            cel="!has(self.onStall) || self.onStall != 'Restart' || self.stalledAfter.matches('[1-9]')",
            broken=lambda r, _: {} if r.on_stall == "Restart" and r.stalled_after == 0 else None,
        ),
    )
