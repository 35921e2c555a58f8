"""A run and its pods as the API server returns them: the status is of the operator's plan(), the pods are
made of its templates."""

from typing import Any

from distill_operator.attempt import Attempt, Origin
from distill_operator.children import build_child

from tests.fakes.simulated_cluster import (
    SETTINGS,
    SimulatedCluster,
    manifest,
    observed_run,
    pod_templates,
    progress,
)

RUNNING: dict[str, Any] = {"running": {"startedAt": "2026-01-01T00:00:10Z"}}
CREATING: dict[str, Any] = {"waiting": {"reason": "ContainerCreating"}}
SUCCEEDED: dict[str, Any] = {"terminated": {"exitCode": 0, "reason": "Completed"}}
KILLED: dict[str, Any] = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
PHASES = {"running": "Running", "waiting": "Pending", "terminated": "Failed"}


def training(**spec: Any) -> SimulatedCluster:
    """A run whose stage has trained 400 of its 1000 tokens."""
    cluster = SimulatedCluster(spec)
    cluster.reconcile()
    cluster.set_child_state("Running")
    cluster.advance(60)
    cluster.set_child_state("Succeeded")
    cluster.reconcile_repeatedly()
    cluster.set_child_state("Running")
    cluster.set_progress(
        progress("vanilla", iteration=2, done=400, tokens_per_second=10.0, loss=3.25, message="Step 2 of 5")
    )
    cluster.advance(30)
    cluster.reconcile()
    return cluster


def run_object(cluster: SimulatedCluster) -> dict[str, Any]:
    """The DistillRun with its present status."""
    return {**manifest(**cluster.spec), "status": cluster.status.dump()}


def pods(
    cluster: SimulatedCluster, step: str, state: dict[str, Any] = RUNNING, attempt: int = 1
) -> list[dict[str, Any]]:
    """The pods of an attempt of a step, whose own containers are in `state`; without one no node fits.

    Names and further labels are as the Job controller and the training operator make them.
    """
    run = observed_run(**cluster.spec).run
    assert run is not None
    made = Attempt(run, step, attempt, Origin("b" * 64, None), SETTINGS)
    found = []
    for place, (count, template) in enumerate(pod_templates(build_child(made))):
        for number in range(count):
            kind = ("master", "worker")[place]
            name = f"{made.name}-{kind}-{number}" if template["spec"].get("restartPolicy") is None else ""
            extra = (
                {
                    "training.kubeflow.org/replica-type": kind,
                    "training.kubeflow.org/replica-index": str(number),
                }
                if name
                else {"batch.kubernetes.io/job-completion-index": str(number)}
            )
            found.append(_pod(template, name or f"{made.name}-{number}-x7k2p", extra, state))
    return found


def _pod(template: dict[str, Any], name: str, extra: dict[str, str], state: dict[str, Any]) -> dict[str, Any]:
    meta = {
        **template["metadata"],
        "name": name,
        "namespace": "team",
        "creationTimestamp": "2026-01-01T00:00:05Z",
    }
    meta["labels"] = {**meta["labels"], **extra}
    container = template["spec"]["containers"][0]["name"]
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }
    status: dict[str, Any] = {"phase": "Pending", "conditions": [unschedulable]}
    spec = dict(template["spec"])
    if state:
        phase = "Succeeded" if state == SUCCEEDED else PHASES[next(iter(state))]
        status = {"phase": phase, "containerStatuses": [{"name": container, "state": state}]}
        spec["nodeName"] = "node-1"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec, "status": status}
