"""What a person can do about each reason that a run's status gives for waiting, stalling or failing.

The reasons are those of docs/reference/operator.md and metrics.md.
"""

from collections.abc import Mapping

LOGS = "`vpmoe logs {run} {step}` shows its log"

REMEDIES: Mapping[str, str] = {
    # waiting
    "Queued": "`kubectl get distillruns --all-namespaces` shows who holds GPUs; the run starts by itself",
    "Held": "Kueue admits it: `kubectl get workloads` shows its place",
    "Suspended": "`kubectl patch distillrun {run} --type=merge "
    """--patch='{{"spec":{{"suspend":false}}}}'` resumes it""",
    "Retrying": LOGS,
    # stalled
    "KubeflowMissing": "Install the Kubeflow training operator; the run starts by itself. Or set "
    "runtime.backend to Job",
    "PoolTooSmall": "Add nodes, or ask for fewer GPUs or smaller pods. If an autoscaler adds nodes, "
    "set runtime.scheduling to Immediate",
    "NameTaken": "Delete that object, or give the run another name",
    "ChildRefused": "Correct what the message names: a quota, a webhook or a right; the operator tries again",
    "PodPending": "`kubectl describe pods --selector=vpmoe.dev/run={run}` says what its pods wait for",
    "NoProgress": LOGS,
    "Invalid": "Correct the spec; or, if the run has started, go back to the version that started it",
    "StatusUnreadable": "Upgrade the operator again",
    "ReconcileError": "Correct what the message names; otherwise report it as a bug, with the operator's log",
    # failed
    "AttemptsExhausted": LOGS + ". Correct the cause, then raise runtime.attempts",
    "PermanentFailure": LOGS + ". Correct the cause, then raise runtime.attempts",
    "InterruptionsExhausted": LOGS + ". Then raise runtime.interruptions",
    # conditions of jobs, and of their pods
    "RouterCollapse": "Selection biases correct it within some hundred steps; otherwise start again "
    "with a lower learning rate",
    "StepSkipped": "The stage goes on without it; after three in a row the next one fails it. If there are "
    "many, start again with a lower learning rate",
    "CheckpointRefused": "`vpmoe verify` on the run's folder names the damaged objects",
    "TrainerStarved": "The run adapts by itself; more sampler.gpus or teacher.gpus end the wait",
    "Unreachable": "Open port 9090 of the run's pods to the operator: a NetworkPolicy or a mesh closes it",
    "HostNetwork": "An admission policy puts the pods on their node's network: exempt them",
}
"""Reason, or type of a condition, → remedy, with {run} and {step}."""


def remedy(reason: str, run: str, step: str) -> str:
    """What to do about a reason; empty if the run needs no help."""
    return REMEDIES.get(reason, "").format(run=run, step=step)
