"""What the pods of a child say about its step: where they serve progress, which image they run, and the
termination records of those that ended.

Pure functions over live Pod objects. A pod's content is the tenant's: nothing in it may stop the operator.
Why a pod waits or has failed is in pod_diagnosis.py.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from distill_operator.kube import Json
from vpmoe.api.progress import Progress
from vpmoe.api.status import MAX_IMAGE
from vpmoe.api.termination import TerminationRecord

REPLICA_TYPE = "training.kubeflow.org/replica-type"
MAX_COUNT = 2**53
"""Largest count that the API server accepts in a status without loss: JSON numbers are doubles."""
HASH = re.compile(r"[0-9a-f]{64}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


@dataclass(frozen=True)
class AttemptId:
    """One attempt of one step, as a progress names it. `run` is DistillRun.identity."""

    run: str
    step: str
    number: int


@dataclass(frozen=True, order=True)
class PodImage:
    """What the job's own container of a pod runs or ran."""

    image: str
    """Reference of the image, as in the pod's spec."""
    digest: str = ""
    """Digest of the image, as the node reports it; empty if it does not."""


@dataclass(frozen=True)
class PodAddress:
    """Name and IP address of a pod that runs, and what it runs, if that is known."""

    name: str
    ip: str
    image: PodImage | None = None


ImageReports = frozenset[tuple[PodImage, str | None]]
"""Images of an attempt's pods, each with the commit that a pod reported: empty if the image does not hold it,
None if the pod has not reported any."""


@dataclass(frozen=True)
class ProgressReading:
    """The newest reading of a step's progress.

    `progress` is None if there is none yet, or if it cannot be read.
    """

    progress: Progress | None = None
    attempted: bool = False
    """Whether a pod was asked and has answered, or whether it is certain that none does."""
    problem: str = ""
    """Why the progress cannot be read; empty if it can."""
    reason: str = ""
    """The problem as a condition's reason: Unreachable, NotProgress, TooLarge or HostNetwork."""
    images: ImageReports = frozenset()
    """What the pods run that have answered, with the commits that they serve."""


def serving_pods(pods: Iterable[Json], container: str) -> tuple[PodAddress, ...]:
    """The pods whose container `container` runs and serves the step's progress: all, or the Master of a
    PyTorchJob. An address that is none of a pod's is left out, also that of a node.
    """
    found = []
    for pod in (pod for pod in pods if not on_host_network(pod)):
        status, ip = pod.get("status", {}), pod.get("status", {}).get("podIP", "")
        statuses = status.get("containerStatuses", [])
        runs = any(c["name"] == container and "running" in c.get("state", {}) for c in statuses)
        replica = pod["metadata"].get("labels", {}).get(REPLICA_TYPE, "master")
        if runs and replica.lower() == "master" and _is_pod_address(ip):
            found.append(PodAddress(pod["metadata"]["name"], ip, pod_image(pod, container)))
    return tuple(found)


def on_host_network(pod: Json) -> bool:
    """Whether the pod's address is its node's."""
    status = pod.get("status", {})
    node = [status.get("hostIP"), *(entry.get("ip") for entry in status.get("hostIPs", []))]
    return bool(status.get("podIP")) and status["podIP"] in node


def pod_image(pod: Json, container: str) -> PodImage | None:
    """What the container runs or ran; None if it has not started."""
    status = _container_status(pod, container)
    state = status.get("state", {})
    if "running" not in state and "terminated" not in state:
        return None
    specs = pod.get("spec", {}).get("containers", [])
    reference = next((spec.get("image", "") for spec in specs if spec["name"] == container), "")
    image = reference or status.get("image", "")  # the node may show another name of the same image
    return PodImage(image[:MAX_IMAGE], image_digest(status.get("imageID", ""))) if image else None


def image_digest(image_id: str) -> str:
    """The digest in a container's imageID; empty if there is none.

    It is the digest by which the image was pulled: `repository@sha256:…`, with `docker-pullable://` in front
    in older clusters. Of an image that was loaded on the node and never pulled, it is the image's own id:
    `sha256:…`, or its digits alone.
    """
    text = image_id.rpartition("://")[2].rpartition("@")[2]
    if HASH.fullmatch(text):
        return f"sha256:{text}"
    return text if DIGEST.fullmatch(text) else ""


def reported_images(pods: Iterable[Json], container: str) -> ImageReports:
    """What the container runs or ran in these pods, with the commits in their termination records."""
    found: set[tuple[PodImage, str | None]] = set()
    for pod in pods:
        image = pod_image(pod, container)
        message = _container_status(pod, container).get("state", {}).get("terminated", {}).get("message", "")
        if image is not None:
            record = TerminationRecord.parse(message)
            found.add((image, record.commit if record is not None else None))
    return frozenset(found)


def _container_status(pod: Json, container: str) -> Json:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return next((status for status in statuses if status["name"] == container), {})


def find_record(pods: Iterable[Json], container: str) -> TerminationRecord | None:
    """The termination record of the pod that got furthest; None if no pod has one.

    Each pod of an Indexed Job records the progress of the whole step, as it was when that pod ended.
    """
    records = []
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses", []):
            message = status.get("state", {}).get("terminated", {}).get("message", "")
            if status["name"] == container and (record := TerminationRecord.parse(message)) is not None:
                records.append(record)
    return max(records, key=lambda record: advance(record.progress), default=None)


def advance(progress: Progress | None) -> tuple[bool, int, int, float]:
    """How far a progress is, to compare two of the same attempt."""
    if progress is None:
        return False, 0, 0, 0.0
    parts, tokens = progress.parts, progress.tokens
    return (
        progress.state == "Succeeded",
        parts.done if parts else 0,
        tokens.done if tokens else 0,
        progress.updated.timestamp() if progress.updated.tzinfo else 0.0,
    )


def progress_problem(progress: Progress, attempt: AttemptId) -> str:
    """Why a progress is not one of this attempt that a status can hold; empty if it is."""
    if progress.run not in (None, attempt.run):
        return "it is of another run"
    if progress.step != attempt.step:
        return "it is of another step"
    if progress.attempt != attempt.number:
        return f"it is of attempt {progress.attempt}, not {attempt.number}"
    amounts = [amount for amount in (progress.tokens, progress.parts) if amount is not None]
    counts = [count for amount in amounts for count in (amount.done, amount.total)]
    if progress.checkpoint is not None:
        counts += [progress.checkpoint.iteration, progress.checkpoint.tokens]
    if any(count > MAX_COUNT for count in counts):
        return f"it has a count above {MAX_COUNT}"
    if progress.updated.tzinfo is None:
        return "its time of update has no time zone"
    if progress.dataset is not None and not HASH.fullmatch(progress.dataset.id):
        return "its dataset.id is not 64 hex digits"
    return ""


def _is_pod_address(text: str) -> bool:
    """Whether the text is an IP address that a pod may have. Those of the node itself and of its metadata
    service are none.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return not (
        address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified
    )
