"""Valid DistillRuns by name: one table for both validators. Invalid ones are in invalid_specs.py.

A case is a set of changes to MINIMAL. A change is a dotted path from the root (list items by number) and the
new value; DROP removes the field.
"""

import copy
from typing import Any

DROP = object()

MINIMAL: dict[str, Any] = {
    "apiVersion": "vpmoe.dev/v1alpha1",
    "kind": "DistillRun",
    "metadata": {"name": "minimal"},
    "spec": {
        "dataset": {"source": "s3://corpora/synth/*.parquet"},
        "teacher": {"model": "s3://models/gpt-oss-120b"},
        "storage": {"bucket": "vpmoe"},
        "stages": [{"name": "first", "kind": "Vanilla"}],
    },
}
RESCORED = {"name": "rescored", "kind": "Rescored"}
FORCED = {"name": "forced", "kind": "TeacherForced"}
ONPOLICY = {"name": "onpolicy", "kind": "OnPolicy", "require": {"validity": 0}}
"""A stage that can be the first, because it requires no evaluation."""
GATED = {"name": "gated", "kind": "OnPolicy"}
"""A stage that requires an evaluation of the stage before."""
RUNTIME: dict[str, Any] = {
    "backend": "Job",
    "attempts": 9,
    "interruptions": 9,
    "stalledAfter": "1h",
    "onStall": "Restart",
    "report": False,
    "resources": {"train": {"limits": {"memory": "256Gi"}}},
    "serviceAccountName": "other",
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"a": "b"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "priorityClassName": "high",
    "queueName": "team",
    "scheduling": "Immediate",
    "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
    "envFrom": [{"secretRef": {"name": "hub"}}],
    "podLabels": {"team": "a"},
    "podAnnotations": {"note": "a"},
    "schedulerName": "other",
    "runtimeClassName": "nvidia",
    "sharedMemory": "1Gi",
    "capabilities": ["IPC_LOCK"],
    "teacherCache": {"claimName": "teachers"},
    "weightsVolume": {"claimName": "weights"},
    "gpuMemory": "141G",
}
"""Every field of spec.runtime, with a value that is not its default."""


def phases(*shares: float) -> list[dict[str, Any]]:
    """A curriculum with these shares, all at low effort."""
    return [{"share": share, "effort": {"low": 1}} for share in shares]


Changes = dict[str, Any]

VALID: dict[str, Changes] = {
    "required fields only": {},
    "stages of all kinds": {"spec.stages": [*MINIMAL["spec"]["stages"], RESCORED, FORCED, ONPOLICY]},
    "token counts as numbers": {
        "spec.training.globalBatchTokens": 1_000_000,
        "spec.stages.0.tokens": 1_000_000_000,
    },
    "token counts as text": {"spec.training.globalBatchTokens": "1_000_000", "spec.stages.0.tokens": "1.5B"},
    "token counts with every suffix": {
        "spec.training.globalBatchTokens": "100k",
        "spec.stages.0.tokens": "0.5T",
        "spec.evaluation.everyTokens": "123.456K",
        "spec.training.checkpoint.everyTokens": "0.000001M",
    },
    "no limit of collapsed steps": {"spec.training.maxCollapsedSteps": 0},
    "a limit of collapsed steps": {"spec.training.maxCollapsedSteps": 250},
    "no warm-up": {"spec.training.optimizer.warmupTokens": 0},
    "warm-up and checkpoints longer than the stage": {
        "spec.stages.0.tokens": "1M",
        "spec.training.optimizer.warmupTokens": "1B",
        "spec.training.checkpoint.everyTokens": "1B",
    },
    "null where null means none": {
        "spec.student.init": None,
        "spec.student.gpusPerPod": None,
        "spec.evaluation.canary": None,
        "spec.resumeFrom": None,
        "spec.storage.endpoint": None,
        "spec.storage.credentialsSecret": None,
        "spec.storage.caSecret": None,
        "spec.ttlAfterFinished": None,
        "spec.stages.0.stop": None,
    },
    "the weights of another run": {"spec.student.init": {"checkpoint": "s3://vpmoe/runs/a/b-01234567/init/"}},
    "a dense model in a bucket": {"spec.student.init": {"upcycle": {"model": "s3://models/Qwen3-0.6B"}}},
    "a dense model of the hub with a seed": {
        "spec.student.init": {
            "checkpoint": None,
            "upcycle": {"model": "hf://Qwen/Qwen3-0.6B@main", "seed": 2**32 - 1},
        }
    },
    "short sequences, to which the default of maxLength is lowered": {"spec.training.sequenceLength": 512},
    "a batch of exactly one sequence a rank": {"spec.training.globalBatchTokens": 7 * 8192},
    "pods that divide the ranks": {"spec.student.gpus": 8, "spec.student.gpusPerPod": 4},
    "pods no smaller than the ranks": {"spec.student.gpusPerPod": 8},
    "one GPU a pod, with a sampler": {"spec.student.gpusPerPod": 1, "spec.stages": [ONPOLICY]},
    "expert parallelism that divides experts and ranks": {
        "spec.student.gpus": 8,
        "spec.student.expertParallel": 4,
    },
    "a plain Job on one node": {"spec.runtime.backend": "Job"},
    "rescoring on all GPUs": {"spec.rescore.gpus": 8, "spec.stages": [RESCORED]},
    "rescoring on fewer GPUs than the teacher has": {"spec.teacher.gpus": 4, "spec.rescore": {"gpus": 2}},
    "no teacher for Vanilla": {"spec.teacher.gpus": 0},
    "a card on which two ranks fit": {"spec.runtime.gpuMemory": "80G", "spec.student.gpus": 2},
    "a card of which nothing is said": {"spec.runtime.gpuMemory": None, "spec.student.gpus": 1},
    "experts shared by two ranks on a small card": {
        "spec.runtime.gpuMemory": "80Gi",
        "spec.student": {"gpus": 2, "expertParallel": 2},
    },
    "a Hugging Face dataset": {"spec.dataset.source": "hf://PleIAs/SYNTH@0123abc"},
    "a stage that changes part of the optimizer": {
        "spec.stages.0.optimizer": {"learningRate": 0.001, "warmupTokens": "1k"}
    },
    "an on-policy peak equal to minLearningRate": {
        "spec.training.optimizer": {"learningRate": 1e-3, "minLearningRate": 2e-5},
        "spec.stages": [ONPOLICY],
    },
    "early stop with its defaults": {"spec.stages.0.stop": {}},
    "early stop by validity in each kind that measures it": {
        "spec.stages": [
            *(
                {**stage, "stop": {"minValidity": 0.95}}
                for stage in (*MINIMAL["spec"]["stages"], RESCORED, ONPOLICY)
            ),
            {**FORCED, "stop": {"minValidity": 0}},
        ],
    },
    "early stop by validity of rollouts without completions": {
        "spec.stages": [{**ONPOLICY, "stop": {"minValidity": 0.95}}],
        "spec.evaluation.completions": 0,
    },
    "a part of each object of each kind": {
        "spec.stages": [
            {**RESCORED, "subset": {"fraction": 1}, "confidence": {"max": 8}, "mix": 1},
            {**FORCED, "loss": {"ce": 0}},
            {
                **ONPOLICY,
                "rollout": {"maxTokens": {"high": 8192}},
                "sampler": {},
                "require": {},
                "staleness": 0,
            },
        ],
    },
    "no gate before on-policy training": {"spec.stages": [ONPOLICY], "spec.evaluation.completions": 0},
    "a gate after another stage": {"spec.stages": [ONPOLICY, GATED]},
    "a low gate": {
        "spec.stages": [RESCORED, {**GATED, "require": {"validity": 0.01}}],
        "spec.evaluation.completions": 1,
    },
    "shares that are not exact in binary": {
        "spec.stages": [{**ONPOLICY, "curriculum": phases(*[0.1] * 7, 0.3)}]
    },
    "confidence weights that are all 1": {"spec.stages": [{**RESCORED, "confidence": {"min": 1, "max": 1}}]},
    "resources by role": {
        "spec.runtime.resources": {
            "train": {"requests": {"cpu": 4, "memory": "64Gi"}, "limits": {"memory": "128Gi", "rdma/hca": 1}},
            "preprocess": {"requests": {"cpu": "500m", "ephemeral-storage": "1e9"}},
        },
    },
    "scheduling of pods": {
        "spec.runtime.nodeSelector": {"vpmoe.dev/pool": "h200"},
        "spec.runtime.tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "spec.runtime.imagePullSecrets": [{"name": "registry"}],
        "spec.runtime.scheduling": "Immediate",
    },
    "limits of attempts": {"spec.runtime.attempts": 100, "spec.runtime.interruptions": 1000},
    "a hung step is restarted": {"spec.runtime.onStall": "Restart", "spec.runtime.stalledAfter": "0m10s"},
    "no time to stall": {"spec.runtime.stalledAfter": "0s"},
    "variables of the pods": {
        "spec.runtime.env": [
            {"name": "NCCL_DEBUG", "value": "INFO"},
            {"name": "_empty"},
            {"name": "HOMES", "value": "not reserved: only whole names and prefixes with _ are"},
        ]
    },
    "variables of Secrets and ConfigMaps": {
        "spec.runtime.env": [
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
            {
                "name": "HF_ENDPOINT",
                "valueFrom": {"configMapKeyRef": {"name": "hub", "key": "endpoint.url", "optional": True}},
            },
            {"name": "WANDB_API_KEY", "value": ""},
            {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
            {"name": "HF_TOKEN_PATH", "value": "/tmp/token"},
            {"name": "HTTPS_PROXY", "value": "http://proxy:3128"},
            {"name": "NO_PROXY", "value": "s3.example.com,10.0.0.0/8"},
        ],
        "spec.runtime.envFrom": [
            {"secretRef": {"name": "hub"}},
            {"configMapRef": {"name": "nccl.settings", "optional": True}, "prefix": "NCCL_"},
        ],
    },
    "null where a source is none": {
        "spec.runtime.env": [
            {"name": "A", "value": "a", "valueFrom": None},
            {"name": "B", "valueFrom": {"secretKeyRef": {"name": "b", "key": "b"}, "configMapKeyRef": None}},
        ],
        "spec.runtime.envFrom": [{"secretRef": {"name": "a"}, "configMapRef": None}],
        "spec.runtime.sharedMemory": None,
        "spec.runtime.teacherCache": None,
        "spec.runtime.weightsVolume": None,
    },
    "labels and annotations of the pods": {
        "spec.runtime.podLabels": {"team": "a", "example.com/cost-center": "R-7.b", "empty": ""},
        "spec.runtime.podAnnotations": {
            "k8s.v1.cni.cncf.io/networks": '[{"name": "rdma"}]',
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "kueue.x-k8s.io/podset-required-topology": "cloud.provider.com/topology-block",
            "note": "é: anything",
        },
    },
    "devices and huge pages": {
        "spec.runtime.resources": {
            "train": {
                "requests": {"memory": "64Gi", "vpc.amazonaws.com/efa": 4, "hugepages-2Mi": "5120Mi"},
                "limits": {"memory": "128Gi", "rdma/hca": "1", "vpc.amazonaws.com/efa": "4"},
            },
        },
        "spec.runtime.capabilities": ["IPC_LOCK"],
        "spec.runtime.sharedMemory": "16Gi",
    },
    "shared memory in bytes": {"spec.runtime.sharedMemory": 17179869184},
    "another scheduler and runtime class": {
        "spec.runtime.schedulerName": "volcano",
        "spec.runtime.runtimeClassName": "nvidia",
    },
    "a cache of the teacher": {"spec.runtime.teacherCache": {"claimName": "teachers"}},
    "a volume for versions": {"spec.runtime.weightsVolume": {"claimName": "weights"}},
    "durations": {"spec.runtime.stalledAfter": "1h30m", "spec.ttlAfterFinished": "7d"},
    "a name of thirty characters": {"metadata.name": "a" + "-" * 28 + "z"},
    "a stage's name of sixteen": {"spec.stages.0.name": "a123456789012345"},
    "labels and annotations": {"metadata.labels": {"team": "a"}, "metadata.annotations": {"note": "é"}},
    "another conversation": {
        "spec.dataset.conversation": {
            "identity": "Ты — vpMoE.",
            "knowledgeCutoff": "2025-12",
            "date": "2025-12-31",
            "effort": "low",
        },
    },
    "shares of efforts": {"spec.dataset.conversation.effort": "low=0.3,medium=0.4,high=0.3"},
    "shares of efforts in thirds": {
        "spec.dataset.conversation.effort": "low=0.333333,medium=0.333333,high=0.333333"
    },
    "a share of 1 and one of 0": {"spec.dataset.conversation.effort": "medium=1.0,high=0"},
    "an effort that is a mix by default": {
        "spec.stages": [*MINIMAL["spec"]["stages"], ONPOLICY, {**ONPOLICY, "name": "more", "tokens": "1B"}]
    },
    "no export": {"spec.export": {"stages": []}},
    "an export with its default": {"spec.export": {}},
    "exports in any order": {
        "spec.stages": [*MINIMAL["spec"]["stages"], RESCORED, ONPOLICY],
        "spec.export": {"stages": ["onpolicy", "first"]},
    },
    "a conversation without a date": {"spec.dataset.conversation.date": None},
}


def manifest(changes: Changes, name: str | None = None) -> dict[str, Any]:
    """MINIMAL with these changes, named `name` unless the changes set a name."""
    made = copy.deepcopy(MINIMAL)
    made["metadata"]["name"] = name or made["metadata"]["name"]
    for path, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        place: Any = made
        for part in parents:
            place = place[part] if isinstance(part, int) else place.setdefault(part, {})
        if value is DROP:
            del place[last]
        else:
            place[last] = copy.deepcopy(value)
    return made
